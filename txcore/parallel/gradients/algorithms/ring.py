"""Partial sums go round a ring once, then the means do; piece by piece in one buffer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from txcore import varying
from txcore.collectives import axis_index, axis_size, pmean, shift
from txcore.parallel.gradients.algorithms.pieces import count_pieces
from txcore.parallel.gradients.algorithms.plain import send_all_reduce
from txcore.parallel.gradients.algorithms.record import (
    Axes,
    Sizes,
    claim_equal,
    count_devices,
    predict_sent,
)
from txcore.parallel.predicted import Predicted

_MOST_UNROLLED = 8  # devices of a ring whose hops are written out; of a larger one they are a loop


def ring_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average by sums that go round once, and means that do."""
    count, here = axis_size(axes), axis_index(axes)
    width, rest = divmod(flat.size, count)

    def average(start: jax.Array | int, x: jax.Array, size: int) -> jax.Array:
        def place(back: jax.Array | int) -> jax.Array:
            return (here - back) % count * width + start

        def put(block: jax.Array, x: jax.Array, back: jax.Array | int) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(x, block, place(back), 0)

        def hop(i: jax.Array | int, carry: tuple[jax.Array, jax.Array]) -> Any:
            block = shift(carry[0], axes, name=f"{name}/gather")
            return block, put(block, carry[1], 1 + i)

        own = _add_round(lambda back: lax.dynamic_slice_in_dim(x, place(back), size), axes, name)
        # Or XLA for CPU reads and writes x in one loop, and copies all of it before and after.
        own, x = lax.optimization_barrier((own, x))
        return _hop_round(hop, (own, put(own, x, 0)), count)[1]

    if width:
        flat = _for_pieces(average, flat, width, flat.dtype)
    if rest:  # of fewer elements than devices
        last = pmean(flat[count * width :], axes, name=f"{name}/rest")
        flat = lax.dynamic_update_slice_in_dim(
            flat, varying.match_varying(last, flat)[0], count * width, 0
        )
    return claim_equal(flat, axes)


def ring_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average by sums that go round once, each to the device whose block it is."""
    count, here = blocks.shape[0], axis_index(axes)

    def average(start: jax.Array | int, means: jax.Array, size: int) -> jax.Array:
        def read(back: jax.Array | int) -> jax.Array:
            # Indices of one dtype: with x64 that of a loop is wider, which jax 0.10 refuses.
            at = (here - back) % count, start
            wide = jnp.result_type(*at)
            return lax.dynamic_slice(blocks, [jnp.asarray(i, wide) for i in at], (1, size))[0]

        return lax.dynamic_update_slice_in_dim(means, _add_round(read, axes, name), start, 0)

    return _for_pieces(average, jnp.zeros_like(blocks[0]), blocks.shape[1], blocks.dtype)


def _add_round(read: Callable[[Any], jax.Array], axes: Axes, name: str) -> jax.Array:
    """Return the mean of this device's block; `read(i)` is that of the device i places back."""
    count = axis_size(axes)

    def hop(i: jax.Array | int, partial: jax.Array) -> jax.Array:
        return shift(partial, axes, name=f"{name}/sum") + read(2 + i)

    # The sum of block b begins at device b + 1 and ends at b.
    return varying.claim(_hop_round(hop, read(1), count) / count, varying.MEAN_SHARD, axes)


def _hop_round(hop: Callable[[Any, Any], Any], carry: Any, count: int) -> Any:
    return lax.fori_loop(0, count - 1, hop, carry, unroll=count <= _MOST_UNROLLED)


def _for_pieces(
    average: Callable[[Any, jax.Array, int], jax.Array],
    x: jax.Array,
    width: int,
    dtype: DTypeLike,
) -> jax.Array:
    """Repeat `average(start, x, size)` for the pieces of a block, which are half a chunk each."""
    step, count = count_pieces(width, dtype, 2)
    if count:
        x = lax.fori_loop(0, count, lambda i, x: average(i * step, x, step), x)
    return average(count * step, x, width % step) if width % step else x


def send_ring(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `ring_mean` sends."""
    devices = count_devices(sizes)
    width, rest = divmod(elements, devices)
    hops = send_half_ring(devices * width, dtype, sizes) * 2 if width else []
    return hops + (send_all_reduce(rest, dtype, sizes) if rest else [])


def send_half_ring(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `ring_blocks` sends."""
    devices = count_devices(sizes)
    return [predict_sent("collective-permute", sizes, dtype, (devices - 1) * elements // devices)]
