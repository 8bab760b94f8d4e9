"""The algorithms that average flat arrays over devices: what each computes, and what it sends.

All compute the same means by other collectives. Each is one record of `ALGORITHMS`. Whoever has a
flat array and axes of more than one device calls `mean_flat`, or `mean_blocks` where each device is
to have its own block of the mean alone. Both have the derivatives of the plain collective: no
algorithm differentiates its own steps.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

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
    reduce_scatter,
    shift,
)
from txcore.collectives._leaves import mean_dtype
from txcore.parallel.gradients.apart import keep_apart
from txcore.parallel.predicted import Predicted

Name = Literal["plain", "chunked", "reduce_scatter_all_gather", "ring", "hierarchical", "bf16_wire"]
Axes = tuple[str, ...]
Sizes = Mapping[str, int]  # of the axes, outermost first
Sends = Callable[[int, str, Sizes], list[Predicted]]  # (elements of one device, dtype, sizes)

CHUNK_BYTES = 4 << 20  # of one piece of "chunked"


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


# chunked: the same in pieces, which stay apart in the compiled program.


def _chunked_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    pieces = jnp.split(flat, _cuts(flat.size, flat.dtype, 1))
    jobs = [functools.partial(pmean, axis=axes, name=f"{name}/{i}") for i in range(len(pieces))]
    return jnp.concatenate(keep_apart(jobs, pieces, name))


def _chunked_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    devices, width = blocks.shape
    pieces = jnp.split(blocks, _cuts(width, blocks.dtype, devices), axis=1)
    scatter = functools.partial(reduce_scatter, axis=axes, mean=True)
    jobs = [functools.partial(scatter, name=f"{name}/{i}") for i in range(len(pieces))]
    return jnp.concatenate(keep_apart(jobs, pieces, name), axis=1)[0]


def _cuts(width: int, dtype: DTypeLike, rows: int) -> list[int]:
    step = max(1, CHUNK_BYTES // (jnp.dtype(dtype).itemsize * rows))
    return list(range(step, width, step))


def _send_chunks(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    return [_predict("all-reduce", sizes, dtype, *_widths(elements, dtype, 1))]


def _send_scattered_chunks(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    devices = _devices(sizes)
    widths = _widths(elements // devices, dtype, devices)
    return [_predict("reduce-scatter", sizes, dtype, *(devices * width for width in widths))]


def _widths(width: int, dtype: str, rows: int) -> list[int]:
    ends = [0, *_cuts(width, dtype, rows), width]
    return [end - start for start, end in itertools.pairwise(ends)]


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


# ring: partial sums go round once, then the means do; N - 1 hops each, in a loop.


def _ring_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    blocks = pad_to_blocks(flat, axis_size(axes))
    part = _ring_blocks(blocks, axes, name)
    return _ring_gather(part, axes, name).reshape(-1)[: flat.size]


def _ring_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    count, here = blocks.shape[0], axis_index(axes)

    def take_block(back: jax.Array | int) -> jax.Array:
        return lax.dynamic_index_in_dim(blocks, (here - back) % count, keepdims=False)

    def hop(partial: jax.Array, back: jax.Array) -> tuple[jax.Array, None]:
        return shift(partial, axes, name=f"{name}/sum") + take_block(back), None

    # The sum of block b begins at device b + 1 and ends at b.
    total = lax.scan(hop, take_block(1), jnp.arange(2, count + 1, dtype=jnp.int32))[0]
    return varying.claim(total / count, varying.MEAN_SHARD, axes)


def _ring_gather(part: jax.Array, axes: Axes, name: str) -> jax.Array:
    count, here = axis_size(axes), axis_index(axes)

    def put_block(blocks: jax.Array, block: jax.Array, back: jax.Array | int) -> jax.Array:
        return lax.dynamic_update_index_in_dim(blocks, block, (here - back) % count, 0)

    def hop(
        carry: tuple[jax.Array, jax.Array], back: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        blocks, block = carry
        block = shift(block, axes, name=f"{name}/gather")
        return (put_block(blocks, block, back), block), None

    empty = jnp.broadcast_to(jnp.zeros_like(part), (count, *part.shape))
    start = put_block(empty, part, 0), part
    blocks = lax.scan(hop, start, jnp.arange(1, count, dtype=jnp.int32))[0][0]
    # Each device has put every block into its place, which no type can tell.
    along = [axis for axis in axes if axis in _compat.varying_axes(blocks)]
    return varying.claim(blocks, varying.MEAN, axes, drop=along)


def _send_ring(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    devices = _devices(sizes)
    block = -(-elements // devices)
    return [_predict("collective-permute", sizes, dtype, *[(devices - 1) * block] * 2)]


def _send_half_ring(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    devices = _devices(sizes)
    return [_predict("collective-permute", sizes, dtype, (devices - 1) * elements // devices)]


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
    return _from_bits(whole, flat.dtype)[: flat.size]


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
            "hierarchical", _levels_mean, _levels_blocks, _send_levels, _send_scattered_levels
        ),
        Algorithm("bf16_wire", _narrow_mean, _narrow_blocks, _send_narrow, _send_scattered_narrow),
    )
}
assert set(ALGORITHMS) == set(get_args(Name))
