"""The collectives of a ring as functions of arrays: their checks, layouts and transposes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from txcore import _compat, varying
from txcore.kernels.ring.blocks import from_rows, lay_in_rows, to_rows
from txcore.kernels.ring.call import check_ring, ring_size
from txcore.kernels.ring.gather import gather_blocks
from txcore.kernels.ring.scatter import scatter_sums


def ring_all_gather(
    x: ArrayLike, axis: str, *, dim: int = 0, invariant: bool = False, interpret: Any = None
) -> jax.Array:
    """Concatenate the shards of all devices along `axis`, on every device, by remote DMA.

    Equation: `y[i] = concatenate([x[0], ..., x[n-1]], dim)`. Each TPU sends its shard both ways
    round the ring, half of the way each: n - 1 shards' bytes a device. A GPU sends it once, to the
    switch of its node.

    Transpose: `ring_reduce_scatter` over the same axis and dim. With `invariant` the cotangent is
    the same on every device, and is only sliced; with check_vma=False `ring_reduce_scatter` again.

    Args:
      x: this device's shard, float32, bfloat16 or int32, of at least one dim, any sizes.
      axis: a mesh axis of a TPU slice, bound by `jax.shard_map`; or the mesh's only one, of the
        GPUs of one node (H100, H200, Blackwell).
      dim: the array dim to concatenate along.
      invariant: type the result as invariant along `axis`.
      interpret: None to run on TPU or GPU; True or a `pltpu.InterpretParams` to simulate it on CPU.

    Returns:
      The gathered array, `dim` longer by the axis size.

    Raises:
      NotImplementedError: the device is neither, and no simulation was asked for.
      TypeError: the dtype is another, or `axis` is no name.
      NameError: `axis` is not bound here.
      ValueError: x does not have `dim`.

    Example:
      >>> from jax.sharding import Mesh, PartitionSpec as P
      >>> from txcore import kernels
      >>> mesh = Mesh(jax.devices()[:2], "data")
      >>> specs = {"mesh": mesh, "in_specs": P("data"), "out_specs": P("data")}
      >>> gather = jax.shard_map(
      ...     lambda x: kernels.ring_all_gather(x, "data", interpret=True), **specs)
      >>> gather(jnp.arange(4.0))
      Array([0., 1., 2., 3., 0., 1., 2., 3.], dtype=float32)

    References:
      https://docs.jax.dev/en/latest/pallas/tpu/distributed.html
    """
    x = _prepare("ring_all_gather", jnp.asarray(x), axis, interpret)
    at = _check_dim("ring_all_gather", x, dim)
    if ring_size(axis) == 1:
        return _drop_varying(x, axis) if invariant else x
    return (_gather_equal if invariant else _gather)(x, axis, at, interpret)


def ring_reduce_scatter(
    x: ArrayLike, axis: str, *, dim: int = 0, interpret: Any = None
) -> jax.Array:
    """Sum `x` over all devices along `axis` and keep this device's shard, by remote DMA.

    Equation: `y[i] = split(sum_j x[j], n, dim)[i]`. Partial sums go round the ring, half of each
    shard either way: n - 1 shards' bytes a device. bfloat16 is added in float32 and sent as
    bfloat16, rounded once a hop. On GPUs the switch reads all of x on each device, n shards;
    jax's kernel asks for no float32 sums of bfloat16 there.

    Transpose: `ring_all_gather` over the same axis and dim.

    Args:
      x: float32, bfloat16 or int32; the axis size divides `dim`.
      axis: as for `ring_all_gather`.
      dim: the array dim to scatter.
      interpret: as for `ring_all_gather`.

    Returns:
      This device's shard of the sum, `dim` shorter by the axis size.

    Raises:
      NotImplementedError, TypeError, NameError: as `ring_all_gather`.
      ValueError: x does not have `dim`, or the axis size does not divide it.

    Example:
      >>> from jax.sharding import Mesh, PartitionSpec as P
      >>> from txcore import kernels
      >>> mesh = Mesh(jax.devices()[:2], "data")
      >>> specs = {"mesh": mesh, "in_specs": P("data"), "out_specs": P("data")}
      >>> scatter = jax.shard_map(
      ...     lambda x: kernels.ring_reduce_scatter(x, "data", interpret=True), **specs)
      >>> scatter(jnp.arange(4.0))
      Array([2., 4.], dtype=float32)
    """
    x = _prepare("ring_reduce_scatter", jnp.asarray(x), axis, interpret)
    at, size = _check_dim("ring_reduce_scatter", x, dim), ring_size(axis)
    if x.shape[at] % size:
        raise ValueError(
            f"ring_reduce_scatter over {axis!r} needs dim={dim} of x divisible by {size}, got "
            f"shape {x.shape}: pad it to {-(-x.shape[at] // size) * size}"
        )
    return _scatter(x, axis, at, interpret) if size > 1 else x


def ring_all_reduce(x: ArrayLike, axis: str, *, interpret: Any = None) -> jax.Array:
    """Sum `x` over all devices along `axis`, on every device, by remote DMA.

    Equation: `y[i] = sum_j x[j]`: a reduce-scatter, then an all-gather, 2 (n - 1) / n of x's bytes
    a device. All devices get the same to the last bit.

    Transpose: as `tx.psum`'s: the cotangent, cast to varying; with check_vma=False the sum again.

    Args:
      x: float32, bfloat16 or int32, any shape.
      axis: as for `ring_all_gather`.
      interpret: as for `ring_all_gather`.

    Returns:
      The sum, invariant along `axis`.

    Raises:
      NotImplementedError, TypeError, NameError: as `ring_all_gather`.

    Example:
      >>> from jax.sharding import Mesh, PartitionSpec as P
      >>> from txcore import kernels
      >>> mesh = Mesh(jax.devices()[:2], "data")
      >>> specs = {"mesh": mesh, "in_specs": P("data"), "out_specs": P()}
      >>> total = jax.shard_map(
      ...     lambda x: kernels.ring_all_reduce(x, "data", interpret=True), **specs)
      >>> total(jnp.arange(4.0))
      Array([2., 4.], dtype=float32)
    """
    x = _prepare("ring_all_reduce", jnp.asarray(x), axis, interpret)
    return _reduce(x, axis, interpret) if ring_size(axis) > 1 else _drop_varying(x, axis)


def _prepare(op: str, x: jax.Array, axis: str, interpret: Any) -> jax.Array:
    """Check an operand, and return it varying along the axis, where jax tracks that."""
    check_ring(op, axis, interpret, on_gpu=True, x=x)
    is_equal = _compat.tracks_varying(axis) and axis not in _compat.varying_axes(x)
    return _compat.cast_to_varying(x, (axis,)) if is_equal else x


def _check_dim(op: str, x: jax.Array, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(
            f"{op} needs dim= a dim of x, which has shape {x.shape}, got {dim!r}"
            + ("; give a scalar a dim with x[None]" if x.ndim == 0 else "")
        )
    return dim % x.ndim


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, axis: str, dim: int, interpret: Any) -> jax.Array:
    laid = lay_in_rows(x.shape, x.dtype)
    blocks = gather_blocks(to_rows(x, laid), axis, interpret)
    shards = jnp.moveaxis(from_rows(blocks, laid), 0, dim)
    whole = shards.reshape(*x.shape[:dim], shards.shape[dim] * x.shape[dim], *x.shape[dim + 1 :])
    return varying.claim(whole, varying.GATHERED, (axis,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_equal(x: jax.Array, axis: str, dim: int, interpret: Any) -> jax.Array:
    return _drop_varying(_gather(x, axis, dim, interpret), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _scatter(x: jax.Array, axis: str, dim: int, interpret: Any) -> jax.Array:
    size = ring_size(axis)
    split = x.reshape(*x.shape[:dim], size, x.shape[dim] // size, *x.shape[dim + 1 :])
    shards = jnp.moveaxis(split, dim, 0)
    laid = lay_in_rows(shards.shape[1:], x.dtype, parts=2)
    return from_rows(scatter_sums(to_rows(shards, laid), laid, axis, interpret), laid)


_gather.defvjp(
    lambda x, axis, dim, interpret: (_gather(x, axis, dim, interpret), None),
    lambda axis, dim, interpret, _, g: (_scatter(g, axis, dim, interpret),),
)
_gather_equal.defvjp(
    lambda x, axis, dim, interpret: (_gather_equal(x, axis, dim, interpret), None),
    lambda axis, dim, interpret, _, g: (_slice_own(g, axis, dim, interpret),),
)
_scatter.defvjp(
    lambda x, axis, dim, interpret: (_scatter(x, axis, dim, interpret), None),
    lambda axis, dim, interpret, _, g: (_gather(g, axis, dim, interpret),),
)


def _slice_own(g: jax.Array, axis: str, dim: int, interpret: Any) -> jax.Array:
    """Return this device's shard of a cotangent that is the same on every device."""
    if not _compat.tracks_varying(axis):
        return _scatter(g, axis, dim, interpret)
    g = _compat.cast_to_varying(g, (axis,))
    length = g.shape[dim] // ring_size(axis)
    return lax.dynamic_slice_in_dim(g, lax.axis_index(axis) * length, length, dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reduce(x: jax.Array, axis: str, interpret: Any) -> jax.Array:
    size = ring_size(axis)
    flat = jnp.pad(x.reshape(-1), (0, -x.size % size)).reshape(size, -1)
    laid = lay_in_rows(flat.shape[1:], x.dtype, parts=2)
    part = scatter_sums(to_rows(flat, laid), laid, axis, interpret)
    whole = from_rows(gather_blocks(part, axis, interpret), laid)
    whole = whole.reshape(-1)[: x.size].reshape(x.shape)
    return _drop_varying(varying.claim(whole, varying.SUM, (axis,)), axis)


def _reduce_forward(x: jax.Array, axis: str, interpret: Any) -> tuple[jax.Array, None]:
    return _reduce(x, axis, interpret), None


def _reduce_backward(axis: str, interpret: Any, _: None, g: jax.Array) -> tuple[jax.Array]:
    if not _compat.tracks_varying(axis):
        return (_reduce(g, axis, interpret),)
    return (_compat.cast_to_varying(g, (axis,)),)


_reduce.defvjp(_reduce_forward, _reduce_backward)


def _drop_varying(x: jax.Array, axis: str) -> jax.Array:
    """Type as equal what is the same on every device, where jax tracks that."""
    along = [axis] if axis in _compat.varying_axes(x) else []
    return varying.claim(x, "", (), drop=along)
