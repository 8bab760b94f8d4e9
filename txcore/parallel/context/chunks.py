"""Which tokens of a sequence each device holds, so that causal attention is equal work for all.

The sequence is cut into 2n chunks for n devices. Device i holds chunks i and 2n-1-i: an early one,
whose tokens see few others, and a late one, whose tokens see many.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore.collectives import axis_index, axis_size


def split_chunks(x: Any, n: int, *, dim: int = 1) -> np.ndarray:
    """Put a sequence into the order in which n devices hold it, on the host.

    Sharded over the sequence's axis in this order, device i has chunks i and 2n-1-i.

    Args:
      x: array whose dim `dim` is the sequence; 2n divides its length (any is right for n = 1).
      n: devices along the axis.
      dim: the sequence's dim.

    Returns:
      The array with that dim reordered. `merge_chunks` undoes it.

    Raises:
      ValueError: 2n does not divide the length.

    Example:
      >>> tx.context.split_chunks(np.arange(8), 2, dim=0).tolist()
      [0, 1, 6, 7, 2, 3, 4, 5]

    References:
      Balanced ring attention as in PyTorch's context parallelism (pytorch PR 132442).
    """
    x = np.asarray(x)
    return np.take(x, _order_tokens(x.shape[dim], n), axis=dim)


def merge_chunks(x: Any, n: int, *, dim: int = 1) -> np.ndarray:
    """Put a sequence back into its own order, on the host: the inverse of `split_chunks`.

    Args:
      x: array in the order of `split_chunks`.
      n: devices along the axis.
      dim: the sequence's dim.

    Returns:
      The array with that dim in the order of the sequence.

    Raises:
      ValueError: 2n does not divide the length.

    Example:
      >>> tx.context.merge_chunks(np.array([0, 1, 6, 7, 2, 3, 4, 5]), 2, dim=0).tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    x = np.asarray(x)
    return np.take(x, np.argsort(_order_tokens(x.shape[dim], n)), axis=dim)


def positions(axis: str, length: int) -> Any:
    """Return where this device's tokens stand in the whole sequence.

    What learned or rotary positions and a mask need, inside `shard_map`.

    Args:
      axis: the sequence's mesh axis.
      length: tokens on this device, an even number.

    Returns:
      int32 array of shape (length,); from 0 on where the axis has one device.

    Raises:
      ValueError: `length` is odd, and the axis has more than one device.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x):
      ...     return tx.context.positions("context", x.shape[0])
      >>> tx.testing.run_sharded(f, np.zeros(8), axes={"context": 2}).tolist()
      [0, 1, 6, 7, 2, 3, 4, 5]
    """
    n = axis_size(axis)
    if n == 1:
        return jnp.arange(length, dtype=jnp.int32)
    if length % 2:
        raise ValueError(
            f"context.positions needs an even number of tokens on each device, got {length}: each "
            "holds two chunks; pad the sequence"
        )
    rank, half = axis_index(axis), length // 2
    inner = jnp.arange(half, dtype=jnp.int32)
    return jnp.concatenate([rank * half + inner, (2 * n - 1 - rank) * half + inner])


def token_keys(keys: jax.Array, axis: str, length: int) -> jax.Array:
    """Return a random key for each token of this device: the same on any number of devices.

    Args:
      keys: of the examples, shape (batch,): `state.example_keys(batch)`, the same along `axis`.
      axis: the sequence's mesh axis.
      length: tokens on this device.

    Returns:
      Typed keys of shape (batch, length), each folded with its token's place in the sequence.

    Raises:
      As `positions`.

    Example:
      >>> def drop(x):  # as a step does with state.example_keys(batch)
      ...     keys = jax.random.split(jax.random.key(0), x.shape[0])
      ...     keys = tx.context.token_keys(keys, "context", x.shape[1])
      ...     kept = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 0.5)))(keys)
      ...     return jax.numpy.where(kept, x, 0)
      >>> x = np.ones((2, 8), np.float32)
      >>> spec = P(None, "context")
      >>> one, two = (tx.testing.run_sharded(drop, x, axes={"context": n}, in_specs=(spec,),
      ...                                    out_specs=spec) for n in (1, 2))
      >>> bool((tx.context.merge_chunks(two, 2) == one).all())
      True
    """
    of_example = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(of_example, in_axes=(0, None))(keys, positions(axis, length))


def _order_tokens(length: int, n: int) -> np.ndarray:
    if n == 1:
        return np.arange(length)
    if n < 1 or length % (2 * n):
        raise ValueError(
            f"context.split_chunks needs a sequence that 2 x {n} devices divide, got {length} "
            f"tokens: pad it to {-(-length // max(1, 2 * n)) * 2 * n}"
        )
    chunks = np.arange(length).reshape(2 * n, -1)
    return np.concatenate([chunks[[i, 2 * n - 1 - i]].ravel() for i in range(n)])
