"""A batch in chunks, so that what is computed of one chunk stays in the cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore import varying


def run_chunks(
    function: Callable[..., tuple[Any, Any]], size: int | None, sums: Any, *arrays: Any
) -> tuple[Any, Any]:
    """Apply a function to one chunk of a batch after another.

    Args:
      function: takes a chunk of each array; returns (rows, sums): a tree of arrays with the
        chunk's rows, and a tree of what is summed over the chunks.
      size: rows of a chunk; None for all at once.
      sums: the zeros to which the sums are added, in the dtype to add in.
      *arrays: trees of arrays with the batch as dim 0.

    Returns:
      (rows, sums) of the whole batch.
    """
    like = jax.tree.leaves(arrays)[0]
    rows = like.shape[0]
    if size is None or rows <= size:
        return function(*arrays)
    whole = rows // size * size
    chunks = jax.tree.map(lambda a: a[:whole].reshape(-1, size, *a.shape[1:]), arrays)
    start = jax.tree.map(lambda zero: varying.match_varying(zero, like)[0], sums)

    def add_chunk(sums: Any, chunk: Any) -> tuple[Any, Any]:
        out, more = function(*chunk)
        return jax.tree.map(jnp.add, sums, more), out

    sums, out = lax.scan(add_chunk, start, chunks)
    out = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), out)
    if whole == rows:
        return out, sums
    last = function(*jax.tree.map(lambda a: a[whole:], arrays))
    join = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, last[0])
    return join, jax.tree.map(jnp.add, sums, last[1])
