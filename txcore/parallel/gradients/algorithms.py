"""The algorithms that average flat arrays over devices: what each computes, and what it sends.

All compute the same means by other collectives. Each is one record of `ALGORITHMS`. Whoever has a
flat array and axes of more than one device calls `mean_flat`, or `mean_blocks` where each device is
to have its own block of the mean alone. Both have the derivatives of the plain collective: no
algorithm differentiates its own steps.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from txcore import _compat, varying
from txcore.collectives import (
    all_gather,
    all_to_all,
    axis_index,
    axis_size,
    pmean,
    ppermute,
    reduce_scatter,
    shift,
)
from txcore.collectives._leaves import mean_dtype
from txcore.parallel.predicted import Predicted

Name = Literal[
    "plain",
    "chunked",
    "reduce_scatter_all_gather",
    "ring",
    "recursive_doubling",
    "hierarchical",
    "bf16_wire",
]
Axes = tuple[str, ...]
Sizes = Mapping[str, int]  # of the axes, outermost first
Sends = Callable[[int, str, Sizes], list[Predicted]]  # (elements of one device, dtype, sizes)

CHUNK_BYTES = 4 << 20  # of one piece, where an algorithm goes piece by piece
_MOST_UNROLLED = 8  # devices of a ring whose hops are written out; of a larger one they are a loop


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


def find_algorithm(name: str) -> Algorithm:
    """Return an algorithm by its name."""
    return ALGORITHMS[name]  # type: ignore[index]


def is_power_of_two(sizes: Sizes) -> bool:
    """Tell whether "recursive_doubling" can run over axes of these sizes."""
    return _devices(sizes).bit_count() == 1


def mean_flat(algorithm: Algorithm, flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average a flat array over axes by an algorithm; every device gets the mean.

    Equation: `pmean(flat, axes)`, up to the order of the sums and what `bf16_wire` rounds.

    Transpose: that of `pmean`, whatever the algorithm.

    Args:
      algorithm: one of `ALGORITHMS`.
      flat: shape (n,), floating point; varies along all of `axes`. float16 is summed and sent as
        float32, as by `pmean`.
      axes: mesh axes, each of them of more than one device.
      name: label of the operations' tags.

    Returns:
      Shape (n,), of the same dtype; equal along `axes`.
    """
    if not axes or not flat.size:
        return pmean(flat, axes, name=name) if axes else flat
    wide = flat.astype(mean_dtype(flat.dtype))
    return _mean_flat(wide, algorithm, axes, name).astype(flat.dtype)


def mean_blocks(algorithm: Algorithm, blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average blocks over axes by an algorithm; each device gets the mean of its own block.

    Equation: `reduce_scatter(blocks, axes, mean=True)[0]`. Transpose: that of `reduce_scatter`.

    Args:
      algorithm: one of `ALGORITHMS`.
      blocks: shape (N, k), one for each device in row-major order of `axes`; varies along them.
      axes: mesh axes, each of them of more than one device.
      name: label of the operations' tags.

    Returns:
      Shape (k,), of the same dtype.
    """
    if not axes or not blocks.size:
        return _plain_blocks(blocks, axes, name) if axes else blocks[0]
    wide = blocks.astype(mean_dtype(blocks.dtype))
    return _mean_blocks(wide, algorithm, axes, name).astype(blocks.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _mean_flat(flat: jax.Array, algorithm: Algorithm, axes: Axes, name: str) -> jax.Array:
    return algorithm.mean_flat(flat, axes, name)


@_mean_flat.defjvp
def _mean_flat_jvp(
    algorithm: Algorithm,
    axes: Axes,
    name: str,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    tangent = _plain_mean(*tangents, axes, f"{name}/tangent")
    return _mean_flat(*primals, algorithm, axes, name), tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _mean_blocks(blocks: jax.Array, algorithm: Algorithm, axes: Axes, name: str) -> jax.Array:
    return algorithm.mean_blocks(blocks, axes, name)


@_mean_blocks.defjvp
def _mean_blocks_jvp(
    algorithm: Algorithm,
    axes: Axes,
    name: str,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    tangent = _plain_blocks(*tangents, axes, f"{name}/tangent")
    return _mean_blocks(*primals, algorithm, axes, name), tangent


def pad_to_blocks(flat: jax.Array, count: int) -> jax.Array:
    """Return a flat array as (count, k), with zeros behind its last element."""
    return jnp.pad(flat, (0, -flat.size % count)).reshape(count, -1)


# plain: one all-reduce, or one reduce-scatter.


def _plain_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    return pmean(flat, axes, name=name)


def _plain_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    return reduce_scatter(blocks, axes, mean=True, name=name)[0]


def _send_all_reduce(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    return [_predict("all-reduce", sizes, dtype, elements)]


def _send_reduce_scatter(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    return [_predict("reduce-scatter", sizes, dtype, elements)]


# chunked: the same, piece by piece in one buffer, which a loop updates in place.


def _chunked_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    return _in_pieces(flat, axes, functools.partial(pmean, axis=axes, name=name))


def _in_pieces(flat: jax.Array, axes: Axes, mean: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Apply `mean` to each piece of `CHUNK_BYTES`, and to the rest."""
    step, count = _pieces(flat.size, flat.dtype, 1)
    if not count:
        return mean(flat)

    def put_mean(i: jax.Array | int, x: jax.Array, width: int) -> jax.Array:
        piece = mean(lax.dynamic_slice_in_dim(x, i * step, width))
        return lax.dynamic_update_slice_in_dim(x, varying.match_varying(piece, x)[0], i * step, 0)

    flat = lax.fori_loop(0, count, functools.partial(put_mean, width=step), flat)
    if rest := flat.size % step:
        flat = put_mean(count, flat, rest)
    return _claim_equal(flat, axes)


def _claim_equal(flat: jax.Array, axes: Axes) -> jax.Array:
    """Type as equal what each device has put together of means: no type can tell that it is."""
    along = [axis for axis in axes if axis in _compat.varying_axes(flat)]
    return varying.claim(flat, varying.MEAN, axes, drop=along)


def _chunked_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    devices, width = blocks.shape
    step, count = _pieces(width, blocks.dtype, devices)
    if not count:
        return _plain_blocks(blocks, axes, name)

    def put_mean(i: jax.Array | int, means: jax.Array, width: int) -> jax.Array:
        piece = lax.dynamic_slice_in_dim(blocks, i * step, width, axis=1)
        mean = _plain_blocks(piece, axes, name)
        return lax.dynamic_update_slice_in_dim(means, mean, i * step, 0)

    means = lax.fori_loop(
        0, count, functools.partial(put_mean, width=step), jnp.zeros_like(blocks[0])
    )
    return put_mean(count, means, width % step) if width % step else means


def _pieces(width: int, dtype: DTypeLike, rows: int) -> tuple[int, int]:
    """Return the width of a piece of some rows, and how many of them there are, without a rest."""
    step = max(1, CHUNK_BYTES // (jnp.dtype(dtype).itemsize * rows))
    return step, width // step


def _send_chunks(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    return [_predict("all-reduce", sizes, dtype, *_widths(elements, dtype, 1))]


def _send_scattered_chunks(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    devices = _devices(sizes)
    widths = _widths(elements // devices, dtype, devices)
    return [_predict("reduce-scatter", sizes, dtype, *(devices * width for width in widths))]


def _widths(width: int, dtype: str, rows: int) -> list[int]:
    """Return what a loop sends in all its trips, and the rest."""
    step, count = _pieces(width, dtype, rows)
    return [part for part in (count * step, width % step) if part]


# reduce_scatter_all_gather: each device averages one block, then all get all of them.


def _two_step_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    blocks = pad_to_blocks(flat, axis_size(axes))
    part = _plain_blocks(blocks, axes, name)
    return all_gather(part, axes, invariant=True, name=name)[: flat.size]


def _send_two_steps(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    padded = elements + -elements % _devices(sizes)
    return [
        _predict("reduce-scatter", sizes, dtype, padded),
        _predict("all-gather", sizes, dtype, padded),
    ]


# ring: partial sums go round once, then the means do; piece by piece in one buffer.


def _ring_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
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
    return _claim_equal(flat, axes)


def _ring_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
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
    step, count = _pieces(width, dtype, 2)
    if count:
        x = lax.fori_loop(0, count, lambda i, x: average(i * step, x, step), x)
    return average(count * step, x, width % step) if width % step else x


def _send_ring(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    devices = _devices(sizes)
    width, rest = divmod(elements, devices)
    hops = _send_half_ring(devices * width, dtype, sizes) * 2 if width else []
    return hops + (_send_all_reduce(rest, dtype, sizes) if rest else [])


def _send_half_ring(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    devices = _devices(sizes)
    return [_predict("collective-permute", sizes, dtype, (devices - 1) * elements // devices)]


# recursive_doubling: all of it to and fro with a partner 1, 2, 4 ... devices away, or halves of it.


def _doubling_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    count = axis_size(axes)

    def mean(piece: jax.Array) -> jax.Array:
        for away in _distances(count):
            # a + b is b + a to the last bit, so that all devices get the same.
            piece = piece + ppermute(piece, axes, _swap(count, away), name=f"{name}/{away}")
        return piece / count

    return _claim_equal(_in_pieces(flat, axes, mean), axes)


def _halving_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    count, here = axis_size(axes), axis_index(axes)
    for away in reversed(_distances(count)):
        halves = blocks.reshape(2, away, blocks.shape[1])
        mine = (here // away) % 2
        kept, given = (
            lax.dynamic_index_in_dim(halves, i, keepdims=False) for i in (mine, 1 - mine)
        )
        blocks = kept + ppermute(given, axes, _swap(count, away), name=f"{name}/{away}")
    return varying.claim(blocks[0] / count, varying.MEAN_SHARD, axes)


def _distances(count: int) -> list[int]:
    return [1 << step for step in range(count.bit_length() - 1)]


def _swap(count: int, away: int) -> list[tuple[int, int]]:
    return [(i, i ^ away) for i in range(count)]


def _send_doubling(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    hops = len(_distances(_devices(sizes)))
    return [_predict("collective-permute", sizes, dtype, *_widths(elements, dtype, 1) * hops)]


def _send_halving(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    devices = _devices(sizes)
    sent = [elements * away // devices for away in _distances(devices)]
    return [_predict("collective-permute", sizes, dtype, *sent)]


# hierarchical: over the last axis (a node's devices) all of it, over the others each device's part.


def _levels_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    outer, inner = axes[:-1], axes[-1:]
    blocks = pad_to_blocks(flat, axis_size(inner))
    part = _plain_blocks(blocks, inner, f"{name}/inner")
    if outer:
        part = pmean(part, outer, name=f"{name}/outer")
    return all_gather(part, inner, invariant=True, name=f"{name}/inner")[: flat.size]


def _levels_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    outer, inner = axes[:-1], axes[-1:]
    grid = blocks.reshape(-1, axis_size(inner), blocks.shape[1])
    part = reduce_scatter(grid, inner, dim=1, mean=True, name=f"{name}/inner")[:, 0]
    return _plain_blocks(part, outer, f"{name}/outer") if outer else part[0]


def _send_levels(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    outer, inner = _split_levels(sizes)
    padded = elements + -elements % _devices(inner)
    first, last = _send_two_steps(elements, dtype, inner)
    middle = _send_all_reduce(padded // _devices(inner), dtype, outer) if outer else []
    return [first, *middle, last]


def _send_scattered_levels(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    outer, inner = _split_levels(sizes)
    sent = _send_reduce_scatter(elements, dtype, inner)
    left = elements // _devices(inner)
    return sent + (_send_reduce_scatter(left, dtype, outer) if outer else [])


def _split_levels(sizes: Sizes) -> tuple[Sizes, Sizes]:
    *outer, inner = sizes.items()
    return dict(outer), dict([inner])


# bf16_wire: bfloat16 is sent, and averaged in float32 by the device whose block it is.


def _narrow_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    blocks = pad_to_blocks(flat, axis_size(axes))
    part = _average_narrow(blocks, axes, name)
    whole = all_gather(_to_bits(part), axes, invariant=True, name=name)
    return _claim_equal(_from_bits(whole, flat.dtype)[: flat.size], axes)


def _narrow_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    return _average_narrow(blocks, axes, name).astype(blocks.dtype)


def _average_narrow(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Return the mean of this device's block, in float32 or wider."""
    wide = jnp.promote_types(blocks.dtype, jnp.float32)
    bits = all_to_all(_to_bits(blocks), axes, split_dim=0, concat_dim=0, name=name)
    mean = jnp.mean(_from_bits(bits, wide), axis=0)
    return varying.claim(mean, varying.MEAN_SHARD, axes)


# As bits, or XLA for CPU sends the gathered bfloat16 as float32.
def _to_bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def _from_bits(bits: jax.Array, dtype: DTypeLike) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.bfloat16).astype(dtype)


def _send_narrow(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    padded = elements + -elements % _devices(sizes)
    return [
        _predict("all-to-all", sizes, "uint16", padded),
        _predict("all-gather", sizes, "uint16", padded),
    ]


def _send_scattered_narrow(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    return [_predict("all-to-all", sizes, "uint16", elements)]


def _devices(sizes: Sizes) -> int:
    return math.prod(sizes.values())


def _predict(kind: str, sizes: Sizes, dtype: str, *elements: int) -> Predicted:
    return Predicted("gradients", kind, tuple(sizes), dtype, elements)


ALGORITHMS: Mapping[Name, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("plain", _plain_mean, _plain_blocks, _send_all_reduce, _send_reduce_scatter),
        Algorithm("chunked", _chunked_mean, _chunked_blocks, _send_chunks, _send_scattered_chunks),
        Algorithm(
            "reduce_scatter_all_gather",
            _two_step_mean,
            _plain_blocks,
            _send_two_steps,
            _send_reduce_scatter,
        ),
        Algorithm("ring", _ring_mean, _ring_blocks, _send_ring, _send_half_ring),
        Algorithm(
            "recursive_doubling",
            _doubling_mean,
            _halving_blocks,
            _send_doubling,
            _send_halving,
        ),
        Algorithm(
            "hierarchical", _levels_mean, _levels_blocks, _send_levels, _send_scattered_levels
        ),
        Algorithm("bf16_wire", _narrow_mean, _narrow_blocks, _send_narrow, _send_scattered_narrow),
    )
}
assert set(ALGORITHMS) == set(get_args(Name))
