"""The largest values alone, with their places."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore.collectives.all_gather import all_gather
from txcore.kernels.common import checks
from txcore.parallel.gradients.compression import rows
from txcore.parallel.gradients.compression.record import Compression, Exchange
from txcore.parallel.predicted import Predicted


def top_k(fraction: float = 0.01) -> Compression:
    """Send each device's largest values, with their places; the rest waits for the next step.

    The values that are sent count at once, whatever other devices send: the mean of a place that
    one of N devices sends is 1/N of its value. Each device gets N times what one sends, so that the
    bytes grow with N: it pays where N times `fraction` is well below 1.

    Args:
      fraction: of all gradients that are averaged together, above 0 and at most 1; at least one
        value is sent.

    Returns:
      A compression for `DP(compression=)`.

    Raises:
      ValueError: `fraction` is out of its range.

    Example:
      >>> tx.DP("data", compression=tx.compression.top_k(0.05))
      DP(axis='data', compression=top_k(fraction=0.05))

    References:
      Aji and Heafield, "Sparse communication for distributed gradient descent", 2017. Stich et al.,
      "Sparsified SGD with memory", 2018.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ValueError(f"top_k needs fraction= above 0 and at most 1, got {fraction!r}")
    name = f"top_k(fraction={fraction!r})"
    return Compression(
        name, partial(_average_top_k, fraction), partial(_predict_sends, fraction), feedback=True
    )


def _average_top_k(
    fraction: float, grads: list[jax.Array], kept: list[Any], exchange: Exchange
) -> tuple[list[jax.Array], list[jax.Array], list[Any]]:
    shapes = [g.shape for g in grads]
    flat = rows.flatten(grads)
    _, own = lax.top_k(jnp.abs(flat), _count_kept(fraction, flat.size))  # NaN is above all
    sent = {"values": flat.at[own].get(mode="promise_in_bounds"), "places": own}
    every = all_gather(sent, exchange.axes, invariant=True, name=exchange.name)
    empty = jnp.zeros(flat.shape, flat.dtype)
    total = empty.at[every["places"]].add(every["values"], mode="promise_in_bounds")
    error = flat.at[own].set(0, mode="promise_in_bounds")
    return (
        rows.unflatten(total / exchange.devices, shapes),
        rows.unflatten(error, shapes),
        kept,
    )


def _predict_sends(
    fraction: float, shapes: list[jax.ShapeDtypeStruct], exchange: Exchange
) -> list[Predicted]:
    count = exchange.devices * _count_kept(fraction, sum(x.size for x in shapes))
    dtype = checks.common_dtype(*(x.dtype for x in shapes)).name
    return [exchange.predict("all-gather", sent, count) for sent in (dtype, "int32")]


def _count_kept(fraction: float, size: int) -> int:
    if size >= 2**31:
        raise ValueError(
            f"top_k needs less than 2**31 elements that are averaged together, got {size}: average "
            "them in several buckets"
        )
    return max(1, math.ceil(fraction * size))
