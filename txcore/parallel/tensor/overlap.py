"""Products that overlap with what they wait for: shards go round a ring while others multiply.

Both directions of the ring carry shards, so that n devices need n // 2 exchanges. Each exchange
and the products beside it do not depend on each other, and stand alone in a loop's body: written
out one after the other XLA for GPU starts most exchanges where no product is left beside them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore import tags
from txcore.collectives import axis_index, axis_size, shift
from txcore.collectives._algorithms import Algorithm
from txcore.kernels.ring import ring_all_gather_matmul, ring_matmul_reduce_scatter
from txcore.parallel.tensor.product import multiply
from txcore.varying import match_varying

_LABELS = {1: "up", -1: "down"}


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
        return lax.dynamic_update_slice_in_dim(whole, part, owner % n * length, dim)

    def send(shards: dict[int, jax.Array], ways: tuple[int, ...]) -> dict[int, jax.Array]:
        return {by: shift(shards[by], axis, by=by, name=f"{name}.{_LABELS[by]}") for by in ways}

    def place_all(whole: jax.Array, shards: dict[int, jax.Array], distance: Any) -> jax.Array:
        for by, shard in shards.items():
            whole = place(whole, multiply(shard, w), rank - by * distance)
        return whole

    def body(carry: Any, distance: jax.Array) -> tuple[Any, None]:
        whole, shards = carry
        return (place_all(whole, shards, distance), send(shards, (1, -1))), None

    both = (n - 1) // 2  # exchanges in both directions; the shard opposite comes once
    shards = send({1: x, -1: x}, (1, -1) if both else (1,))
    whole = place(whole, first, rank)
    if both > 1:
        (whole, shards), _ = lax.scan(body, (whole, shards), jnp.arange(1, both))
    if both and n % 2 == 0:
        opposite = send(shards, (1,))
        whole, shards = place_all(whole, shards, both), opposite
    return place_all(whole, shards, n // 2)


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
    ways = {1: w[:, :half], -1: w[:, half:]} if half and n > 2 else {1: w}

    def part(by: int, steps: Any) -> jax.Array:
        owner = (rank - by * steps) % n
        rows = lax.dynamic_slice_in_dim(x, owner * length, length, dim)
        return multiply(rows, ways[by])

    def body(sums: dict[int, jax.Array], step: jax.Array) -> tuple[dict[int, jax.Array], None]:
        for by, total in sums.items():
            arrived = shift(total, axis, by=by, name=f"{name}.{_LABELS[by]}")
            sums = {**sums, by: arrived + part(by, 1 + step)}
        return sums, None

    # What arrives at its owner after n - 1 exchanges begins one place behind it.
    sums, _ = lax.scan(body, {by: part(by, 1) for by in ways}, jnp.arange(1, n))
    return jnp.concatenate([sums[by] for by in ways], axis=-1)


def _multiply_rows(
    kernel: Callable[..., jax.Array], x: jax.Array, w: jax.Array, axis: str, dim: int
) -> jax.Array:
    """Apply a kernel of matrices to x, whose dim becomes the first, and so the slowest, of rows."""
    rows = jnp.moveaxis(x, dim, 0)
    y = kernel(rows.reshape(-1, x.shape[-1]), w, axis)
    others = rows.shape[1:-1]
    return jnp.moveaxis(y.reshape(-1, *others, w.shape[1]), 0, dim)
