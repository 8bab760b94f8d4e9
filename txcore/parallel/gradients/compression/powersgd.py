"""Matrices of low rank in place of the gradients, found by one step of power iteration."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from txcore.collectives import pmean
from txcore.kept import Kept
from txcore.kernels.common import checks
from txcore.layout import Layout, drop_axes, entry_axes
from txcore.parallel.gradients.compression.record import Compression, Exchange
from txcore.parallel.predicted import Predicted

EPS = 1e-8  # beside a matrix whose largest element is 1


def powersgd(rank: int = 1, *, start: int = 0) -> Compression:
    """Send two factors of each gradient that is large enough, and the others as they are.

    A gradient M, as a matrix with its last dim for columns, becomes P Q^T of rank `rank`: P is the
    mean of M Q, orthonormalised; Q that of M^T P, kept for the next step (warm start). What is left
    of M is added to the next gradient. Only where (rows + columns) x rank x 2 < rows x columns; the
    other gradients are averaged as they are, in one exchange with P.

    Args:
      rank: at least 1; a matrix with less rows or columns takes that number.
      start: the number of steps that average without it first: a tenth of the run may help the
        result. Both kinds of exchange are in the program then.

    Returns:
      A compression for `DP(compression=)`.

    Raises:
      ValueError: `rank` is not a whole number from 1 on, or `start` not one from 0 on.

    Example:
      >>> tx.DP("data", compression=tx.compression.powersgd(rank=2, start=100))
      DP(axis='data', compression=powersgd(rank=2, start=100))

    References:
      Vogels et al., "PowerSGD", 2019; PyTorch's powerSGD_hook.
    """
    for option, value, least in (("rank", rank, 1), ("start", start, 0)):
        if checks.whole_number(value) is None or value < least:
            raise ValueError(
                f"powersgd needs {option}= a whole number from {least} on, got {value!r}"
            )
    options = f"rank={rank}" + (f", start={start}" if start else "")
    return Compression(
        f"powersgd({options})",
        _average_low_rank,
        partial(_predict_sends, rank),
        partial(_keep_factor, rank),
        feedback=True,
        start=start,
    )


def _find_matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _rank_of(rank: int, shape: tuple[int, ...]) -> int:
    """Return the rank of the factors of a gradient; 0 where they would not be small enough."""
    height, width = _find_matrix_shape(shape)
    rank = min(rank, height, width)
    return rank if (height + width) * rank * 2 < height * width else 0


def _keep_factor(
    rank: int, whole: jax.ShapeDtypeStruct, layout: Layout, sizes: Mapping[str, int]
) -> Any:
    """Return Q: shared, or one for each part of the rows, split as the columns are."""
    entries = [
        tuple(axis for axis in entry_axes(entry) if axis not in layout.reduced)
        for entry in layout.gradient
    ]
    entries += [()] * (len(whole.shape) - len(entries))
    local = tuple(
        size // math.prod(sizes[axis] for axis in axes)
        for size, axes in zip(whole.shape, entries, strict=True)
    )
    own = _rank_of(rank, local)
    if not own:
        return None
    of_rows = tuple(axis for axes in entries[:-1] for axis in axes)
    copies = math.prod(sizes[axis] for axis in of_rows)
    dtype = checks.accumulator(whole.dtype).name
    spec = drop_axes(P(of_rows, entries[-1], None), frozenset())
    return Kept((copies, whole.shape[-1], own), dtype, spec, of_rows, _first_factor)


def _first_factor(shape: tuple[int, ...]) -> np.ndarray:
    """Return the same random Q on every process."""
    random = np.random.Generator(np.random.PCG64(shape[1:]))
    return np.broadcast_to(random.normal(size=shape[1:]), shape)


def _average_low_rank(
    grads: list[jax.Array], kept: list[Any], exchange: Exchange
) -> tuple[list[jax.Array], list[jax.Array], list[Any]]:
    chosen = [i for i, q in enumerate(kept) if q is not None]
    matrices = {i: grads[i].reshape(_find_matrix_shape(grads[i].shape)) for i in chosen}
    sent = [
        _multiply_exactly(matrices[i], kept[i][0]) if i in matrices else g
        for i, g in enumerate(grads)
    ]
    means = pmean(sent, exchange.axes, name=exchange.name)
    errors = [jnp.zeros_like(g) for g in grads]
    left = {i: orthonormalize(means[i]) for i in chosen}
    right = pmean(
        {i: _multiply_exactly(matrices[i].T, left[i]) for i in chosen},
        exchange.axes,
        name=exchange.name,
    )
    kept = list(kept)
    for i in chosen:
        shape = grads[i].shape
        means[i] = _multiply_exactly(left[i], right[i].T).reshape(shape)
        errors[i] = grads[i] - means[i]
        kept[i] = _next_factor(right[i], kept[i][0])[None]
    return means, errors, kept


def _multiply_exactly(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _next_factor(new: jax.Array, old: jax.Array) -> jax.Array:
    """Return Q with columns of length 1; where a column is 0, or not finite, that of before.

    A column that is 0 would stay so: that direction would never be sent again.
    """
    largest = jnp.max(jnp.abs(new), axis=0)
    scaled = new / jnp.where(largest > 0, largest, 1)
    length = jnp.sqrt(jnp.sum(scaled**2, axis=0))
    return jnp.where(jnp.isfinite(length) & (length > 0), scaled / length, old)


def orthonormalize(matrix: jax.Array) -> jax.Array:
    """Make the columns of a matrix orthonormal by Gram-Schmidt, twice; columns of 0 stay so.

    Once is not enough where columns are nearly parallel: what rounding leaves of them is made as
    long as the others, and is parallel to those.

    Args:
      matrix: shape (rows, columns), floating point.

    Returns:
      The same shape; all NaN where an element is not finite.
    """
    largest = jnp.max(jnp.abs(matrix))
    matrix = matrix / jnp.where(largest == 0, 1, largest)
    columns: list[jax.Array] = []
    for i in range(matrix.shape[1]):
        column = matrix[:, i]
        for _ in range(2):
            for other in columns:
                column = column - jnp.sum(other * column) * other
            column = column / (jnp.sqrt(jnp.sum(column**2)) + EPS)
        columns.append(column)
    return jnp.stack(columns, axis=1)


def _predict_sends(
    rank: int, shapes: list[jax.ShapeDtypeStruct], exchange: Exchange
) -> list[Predicted]:
    found: dict[str, list[int]] = {}
    for x in shapes:
        own = _rank_of(rank, x.shape)
        factors = [side * own for side in _find_matrix_shape(x.shape)] if own else [x.size]
        found.setdefault(x.dtype.name, []).extend(factors)
    return [exchange.predict("all-reduce", dtype, *sent) for dtype, sent in found.items()]
