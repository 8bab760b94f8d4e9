"""The plain exchange piece by piece, in one buffer that a loop updates in place."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from txcore import varying
from txcore.collectives import pmean
from txcore.parallel.gradients.algorithms.plain import plain_blocks
from txcore.parallel.gradients.algorithms.record import (
    Axes,
    Sizes,
    claim_equal,
    count_devices,
    predict_sent,
)
from txcore.parallel.predicted import Predicted

CHUNK_BYTES = 4 << 20  # of one piece, where an algorithm goes piece by piece


def chunked_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average piece by piece, by an all-reduce of each."""
    return average_in_pieces(flat, axes, functools.partial(pmean, axis=axes, name=name))


def average_in_pieces(
    flat: jax.Array, axes: Axes, mean: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Apply `mean` to each piece of `CHUNK_BYTES`, and to the rest."""
    step, count = count_pieces(flat.size, flat.dtype, 1)
    if not count:
        return mean(flat)

    def put_mean(i: jax.Array | int, x: jax.Array, width: int) -> jax.Array:
        piece = mean(lax.dynamic_slice_in_dim(x, i * step, width))
        return lax.dynamic_update_slice_in_dim(x, varying.match_varying(piece, x)[0], i * step, 0)

    flat = lax.fori_loop(0, count, functools.partial(put_mean, width=step), flat)
    if rest := flat.size % step:
        flat = put_mean(count, flat, rest)
    return claim_equal(flat, axes)


def chunked_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average piece by piece, by a reduce-scatter of each."""
    devices, width = blocks.shape
    step, count = count_pieces(width, blocks.dtype, devices)
    if not count:
        return plain_blocks(blocks, axes, name)

    def put_mean(i: jax.Array | int, means: jax.Array, width: int) -> jax.Array:
        piece = lax.dynamic_slice_in_dim(blocks, i * step, width, axis=1)
        mean = plain_blocks(piece, axes, name)
        return lax.dynamic_update_slice_in_dim(means, mean, i * step, 0)

    means = lax.fori_loop(
        0, count, functools.partial(put_mean, width=step), jnp.zeros_like(blocks[0])
    )
    return put_mean(count, means, width % step) if width % step else means


def count_pieces(width: int, dtype: DTypeLike, rows: int) -> tuple[int, int]:
    """Return the width of a piece of some rows, and how many of them there are, without a rest."""
    step = max(1, CHUNK_BYTES // (jnp.dtype(dtype).itemsize * rows))
    return step, width // step


def send_chunks(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `chunked_mean` sends."""
    return [predict_sent("all-reduce", sizes, dtype, *piece_widths(elements, dtype, 1))]


def send_scattered_chunks(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `chunked_blocks` sends."""
    devices = count_devices(sizes)
    widths = piece_widths(elements // devices, dtype, devices)
    return [predict_sent("reduce-scatter", sizes, dtype, *(devices * width for width in widths))]


def piece_widths(width: int, dtype: str, rows: int) -> list[int]:
    """Return what a loop sends in all its trips, and the rest."""
    step, count = count_pieces(width, dtype, rows)
    return [part for part in (count * step, width % step) if part]
