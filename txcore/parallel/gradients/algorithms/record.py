"""What an algorithm is: how it averages flat arrays, and what it sends."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from txcore import _compat, varying
from txcore.parallel.predicted import Predicted

Name = Literal[
    "plain",
    "chunked",
    "reduce_scatter_all_gather",
    "ring",
    "recursive_doubling",
    "hierarchical",
    "bf16_wire",
    "remote_dma",
]
Axes = tuple[str, ...]
Sizes = Mapping[str, int]  # of the axes, outermost first
Sends = Callable[[int, str, Sizes], list[Predicted]]  # (elements of one device, dtype, sizes)


@dataclass(frozen=True)
class Algorithm:
    """State how flat arrays are averaged over axes of more than one device.

    Attributes:
      name: as `sync_gradients(algorithm=)` takes it.
      mean_flat: (flat (n,), axes, name) -> (n,), equal on all devices and typed so.
      mean_blocks: (blocks (N, k), axes, name) -> (k,), the mean of this device's block; N is the
        number of devices, in row-major order of the axes.
      sends_flat: what `mean_flat` sends, of n elements of a dtype.
      sends_blocks: what `mean_blocks` sends, of N * k elements of a dtype.
    """

    name: Name
    mean_flat: Callable[[jax.Array, Axes, str], jax.Array]
    mean_blocks: Callable[[jax.Array, Axes, str], jax.Array]
    sends_flat: Sends
    sends_blocks: Sends


def count_devices(sizes: Sizes) -> int:
    """Return the number of devices along axes of these sizes."""
    return math.prod(sizes.values())


def predict_sent(kind: str, sizes: Sizes, dtype: str, *elements: int) -> Predicted:
    """Return the line that predicts one kind of collective over all of these axes."""
    return Predicted("gradients", kind, tuple(sizes), dtype, elements)


def pad_to_blocks(flat: jax.Array, count: int) -> jax.Array:
    """Return a flat array as (count, k), with zeros behind its last element."""
    return jnp.pad(flat, (0, -flat.size % count)).reshape(count, -1)


def claim_equal(flat: jax.Array, axes: Axes) -> jax.Array:
    """Type as equal what each device has put together of means: no type can tell that it is."""
    along = [axis for axis in axes if axis in _compat.varying_axes(flat)]
    return varying.claim(flat, varying.MEAN, axes, drop=along)
