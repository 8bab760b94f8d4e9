"""Gradients as rows, one for each device: its part, or an equal share of all elements."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def flatten(arrays: Sequence[jax.Array]) -> jax.Array:
    """Return all elements in one flat array."""
    return jnp.concatenate([x.reshape(-1) for x in arrays])


def unflatten(flat: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """Return the arrays of which `flatten` made one."""
    sizes = [math.prod(shape) for shape in shapes]
    pieces = _split_sizes(flat, sizes)
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def to_rows(arrays: Sequence[jax.Array], dims: Sequence[int], count: int) -> jax.Array:
    """Return (count, k): row i has the i-th part of each array along its dim."""
    rows = [jnp.moveaxis(x, dim, 0).reshape(count, -1) for x, dim in zip(arrays, dims, strict=True)]
    return jnp.concatenate(rows, axis=1)


def from_rows(
    rows: jax.Array, shapes: Sequence[tuple[int, ...]], dims: Sequence[int]
) -> list[jax.Array]:
    """Return the arrays of which `to_rows` made rows.

    Args:
      rows: (count, k); one row (1, k) gives one part of each array.
      shapes: of the arrays, or of the parts.
      dims: of each the one that was split.
    """
    widths = [math.prod(shape) // rows.shape[0] for shape in shapes]
    pieces = _split_sizes(rows, widths)
    return [
        _move_back(piece, shape, dim)
        for piece, shape, dim in zip(pieces, shapes, dims, strict=True)
    ]


def shapes_of_parts(
    shapes: Sequence[tuple[int, ...]], dims: Sequence[int], count: int
) -> list[tuple[int, ...]]:
    """Return the shapes of one device's parts of arrays that are split along these dims."""
    return [
        (*shape[:dim], shape[dim] // count, *shape[dim + 1 :])
        for shape, dim in zip(shapes, dims, strict=True)
    ]


def _move_back(piece: jax.Array, shape: tuple[int, ...], dim: int) -> jax.Array:
    moved = (shape[dim], *shape[:dim], *shape[dim + 1 :])
    return jnp.moveaxis(piece.reshape(moved), 0, dim)


def _split_sizes(x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Return the pieces of the last dim that have these sizes."""
    return list(jax.lax.split(x, list(sizes), axis=x.ndim - 1))
