"""Lay arrays out as matrices of whole tiles, in which blocks and chunks are cut at tiles' edges."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

LANES = 128
# Of one buffer in a TPU's vector memory. A reduce-scatter has ten; XLA grants a kernel 16 MiB.
CHUNK_BYTES = 512 << 10


@dataclass(frozen=True)
class Rows:
    """State how an array lies in a matrix.

    Attributes:
      shape: of the array.
      rows, columns: of the matrix, rows with what pads them.
      chunks: in how many equal parts of whole tiles the rows go through vector memory.
    """

    shape: tuple[int, ...]
    rows: int
    columns: int
    chunks: int

    @property
    def chunk_rows(self) -> int:
        """The rows of one chunk."""
        return self.rows // self.chunks


def lay_in_rows(shape: tuple[int, ...], dtype: jnp.dtype, *, parts: int = 1) -> Rows:
    """Lay an array in a matrix of whole tiles, of a multiple of `parts` chunks.

    The last dim stays as columns where it is of whole tiles, so that XLA has nothing to move. Other
    arrays are laid flat, with zeros behind the last element.
    """
    sublanes = 32 // dtype.itemsize
    flat = _cut_rows(shape, LANES, sublanes, dtype, parts)
    if len(shape) < 2 or not shape[-1] or shape[-1] % LANES:
        return flat
    as_it_lies = _cut_rows(shape, shape[-1], sublanes, dtype, parts)
    is_small = shape[-1] * sublanes * dtype.itemsize <= CHUNK_BYTES
    is_whole = as_it_lies.rows * as_it_lies.columns == math.prod(shape)
    return as_it_lies if is_small and is_whole else flat


def _cut_rows(
    shape: tuple[int, ...], columns: int, sublanes: int, dtype: jnp.dtype, parts: int
) -> Rows:
    rows = max(-(-math.prod(shape) // columns), 1)
    per_part = -(-rows // parts)
    chunks = -(-per_part * columns * dtype.itemsize // CHUNK_BYTES)
    chunk_rows = -(-per_part // (chunks * sublanes)) * sublanes
    return Rows(shape, chunk_rows * chunks * parts, columns, chunks * parts)


def to_rows(x: jax.Array, laid: Rows) -> jax.Array:
    """Return arrays (..., *laid.shape) as matrices (..., rows, columns)."""
    batch = x.shape[: x.ndim - len(laid.shape)]
    size, room = math.prod(laid.shape), laid.rows * laid.columns
    if size != room:
        x = jnp.pad(x.reshape(*batch, size), [(0, 0)] * len(batch) + [(0, room - size)])
    return x.reshape(*batch, laid.rows, laid.columns)


def from_rows(x: jax.Array, laid: Rows) -> jax.Array:
    """Return matrices (..., rows, columns) as the arrays (..., *laid.shape) that lie in them."""
    batch = x.shape[:-2]
    size, room = math.prod(laid.shape), laid.rows * laid.columns
    if size != room:
        x = x.reshape(*batch, room)[..., :size]
    return x.reshape(*batch, *laid.shape)


def count_laid(shape: tuple[int, ...], dtype: jnp.dtype) -> int:
    """Return the elements of a shard of this shape as a reduce-scatter sends it, in whole tiles.

    Round a ring each device sends n - 1 of them; to the switch of a node of GPUs all n. An
    all-gather of the shards as they are laid then sends n - 1, or one.
    """
    laid = lay_in_rows(shape, dtype, parts=2)
    return laid.rows * laid.columns
