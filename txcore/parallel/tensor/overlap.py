"""Products that overlap with what they wait for: shards go round a ring while others multiply.

Both directions of the ring carry shards, so that n devices need n // 2 exchanges. Each exchange
and the product beside it do not depend on each other: a compiler with asynchronous collectives
runs them at the same time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from txcore import tags
from txcore.collectives import axis_index, axis_size, shift
from txcore.collectives._algorithms import Algorithm
from txcore.kernels.ring import ring_all_gather_matmul, ring_matmul_reduce_scatter
from txcore.parallel.tensor.product import multiply
from txcore.varying import match_varying


def gather_and_multiply(
    x: jax.Array,
    w: jax.Array,
    axis: str,
    dim: int,
    name: str,
    algorithm: Algorithm | None = None,
) -> jax.Array:
    """Return `all_gather(x, axis, dim) @ w`, a shard at a time.

    Args:
      x: shape (..., in), this device's shard along `dim`.
      w: shape (in, out).
      axis: the mesh axis of the ring.
      dim: not the last.
      name: label of the tags.
      algorithm: None, or "remote_dma" for one Pallas kernel on TPU.
    """
    if algorithm:
        with tags.tag_scope(f"all_gather_matmul/{name}"):
            return _multiply_rows(ring_all_gather_matmul, x, w, axis, dim)
    n, rank, length = axis_size(axis), axis_index(axis), x.shape[dim]
    first = multiply(x, w)
    shape = list(first.shape)
    shape[dim] *= n
    whole = match_varying(jnp.zeros(shape, first.dtype), first)[0]

    def place(whole: jax.Array, part: jax.Array, owner: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(whole, part, owner * length, dim)

    whole = place(whole, first, rank)
    from_left = from_right = x
    for distance in range(1, n // 2 + 1):
        from_left = shift(from_left, axis, by=1, name=f"{name}.up")
        is_last_of_even = 2 * distance == n
        if not is_last_of_even:  # the one opposite comes once
            from_right = shift(from_right, axis, by=-1, name=f"{name}.down")
        whole = place(whole, multiply(from_left, w), (rank - distance) % n)
        if not is_last_of_even:
            whole = place(whole, multiply(from_right, w), (rank + distance) % n)
    return whole


def multiply_and_scatter(
    x: jax.Array,
    w: jax.Array,
    axis: str,
    dim: int,
    name: str,
    algorithm: Algorithm | None = None,
) -> jax.Array:
    """Return `reduce_scatter(x @ w, axis, dim)`, a shard at a time.

    The sums of one half of the output features go up the ring, those of the other half down.

    Args:
      x: shape (..., in), whole along `dim`, which the devices divide.
      w: shape (in, out).
      axis: the mesh axis of the ring.
      dim: not the last.
      name: label of the tags.
      algorithm: None, or "remote_dma" for one Pallas kernel on TPU.
    """
    n, rank, total = axis_size(axis), axis_index(axis), x.shape[dim]
    if total % n:
        raise ValueError(
            f"tensor.row_dense needs scatter_dim={dim} of x divisible by the {n} devices of "
            f"{axis!r}, got shape {x.shape}: pad it to {-(-total // n) * n}"
        )
    if algorithm:
        with tags.tag_scope(f"matmul_reduce_scatter/{name}"):
            return _multiply_rows(ring_matmul_reduce_scatter, x, w, axis, dim)
    length, half = total // n, w.shape[-1] // 2
    halves = [(1, w[:, :half]), (-1, w[:, half:])] if half and n > 2 else [(1, w)]

    def part(columns: jax.Array, owner: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(x, (owner % n) * length, length, dim)
        return multiply(rows, columns)

    sums = []
    for by, columns in halves:
        label = f"{name}.up" if by == 1 else f"{name}.down"
        # What arrives at its owner after n - 1 exchanges begins one place behind it.
        total_here = part(columns, rank - by)
        for step in range(1, n):
            total_here = shift(total_here, axis, by=by, name=label)
            total_here = total_here + part(columns, rank - by * (1 + step))
        sums.append(total_here)
    return jnp.concatenate(sums, axis=-1) if len(sums) > 1 else sums[0]


def _multiply_rows(
    kernel: Callable[..., jax.Array], x: jax.Array, w: jax.Array, axis: str, dim: int
) -> jax.Array:
    """Apply a kernel of matrices to x, whose dim becomes the first, and so the slowest, of rows."""
    rows = jnp.moveaxis(x, dim, 0)
    y = kernel(rows.reshape(-1, x.shape[-1]), w, axis)
    others = rows.shape[1:-1]
    return jnp.moveaxis(y.reshape(-1, *others, w.shape[1]), 0, dim)
