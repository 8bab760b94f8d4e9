"""A batch in chunks, so that what is made of one stays in the cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore import _compat


def run(function: Callable[..., tuple[Any, Any]], size: int | None, *arrays: Any) -> Any:
    """Apply a function to one chunk of a batch after the other.

    Args:
      function: takes a chunk of each of the arrays; returns (rows, sums): a tree of arrays with
        the chunk's rows, and one of what is to be added up over the chunks.
      size: rows of a chunk; None for all at once.
      *arrays: trees of arrays with the batch as dim 0.

    Returns:
      (rows, sums), of the whole batch.
    """
    rows = jax.tree.leaves(arrays)[0].shape[0]
    if size is None or rows <= size:
        return function(*arrays)
    whole = rows // size * size
    chunks = jax.tree.map(lambda a: a[:whole].reshape(-1, size, *a.shape[1:]), arrays)
    start = _zeros(function, chunks)

    def one(sums: Any, chunk: Any) -> tuple[Any, Any]:
        out, more = function(*chunk)
        return jax.tree.map(jnp.add, sums, more), out

    sums, out = lax.scan(one, start, chunks)
    out = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), out)
    if whole == rows:
        return out, sums
    last = function(*jax.tree.map(lambda a: a[whole:], arrays))
    join = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, last[0])
    return join, jax.tree.map(jnp.add, sums, last[1])


def _zeros(function: Callable[..., tuple[Any, Any]], chunks: Any) -> Any:
    """Return zeros for the sums, varying as the chunks do."""
    first = jax.tree.map(lambda a: a[0], chunks)
    like = jax.tree.leaves(first)[0]
    shapes = jax.eval_shape(lambda: function(*first)[1])
    return jax.tree.map(
        lambda s: _compat.match_varying(jnp.zeros(s.shape, s.dtype), like)[0], shapes
    )
