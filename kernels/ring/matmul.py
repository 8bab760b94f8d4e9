"""Products that overlap with the collective before or after them, and their transposes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from txcore import _compat, varying
from txcore.kernels.ring.blocks import LANES
from txcore.kernels.ring.call import check_ring, ring_size
from txcore.kernels.ring.gather_product import gather_product
from txcore.kernels.ring.product import pad_matrix, round_up
from txcore.kernels.ring.product_scatter import product_scatter

FLOATS = ("float32", "bfloat16")


def ring_all_gather_matmul(
    x: ArrayLike, w: ArrayLike, axis: str, *, interpret: Any = None
) -> jax.Array:
    """Compute `all_gather(x, axis) @ w`, each shard while the next ones are on their way.

    Equation: `y[i] = concatenate([x[0], ..., x[n-1]]) @ w[i]`. Products are added up in float32 and
    rounded once. Each device sends n - 1 shards of x.

    Transpose: for x `ring_matmul_reduce_scatter` of the cotangent and w's transpose; for w the
    gathered x, which is kept, transposed, times the cotangent.

    Args:
      x: this device's shard, shape (rows, in), float32 or bfloat16.
      w: shape (in, out), x's dtype, of this device.
      axis: as for `ring_all_gather`.
      interpret: as for `ring_all_gather`.

    Returns:
      Shape (n * rows, out), x's dtype.

    Raises:
      NotImplementedError, NameError: as `ring_all_gather`.
      TypeError: the dtypes differ, or are others.
      ValueError: the shapes do not fit.

    Example:
      >>> from jax.sharding import Mesh, PartitionSpec as P
      >>> from txcore import kernels
      >>> mesh = Mesh(jax.devices()[:2], "data")
      >>> product = jax.shard_map(
      ...     lambda x, w: kernels.ring_all_gather_matmul(x, w, "data", interpret=True),
      ...     mesh=mesh, in_specs=(P("data"), P(None, "data")), out_specs=P(None, "data"))
      >>> product(jnp.ones((6, 4)), jnp.ones((4, 10))).shape
      (6, 10)

    References:
      Wang et al., "Overlap communication with dependent computation via decomposition", 2023.
    """
    x, w = _prepare("ring_all_gather_matmul", x, w, axis, interpret)
    return _gather_product(x, w, axis, interpret) if ring_size(axis) > 1 else _multiply(x, w)


def ring_matmul_reduce_scatter(
    x: ArrayLike, w: ArrayLike, axis: str, *, interpret: Any = None
) -> jax.Array:
    """Compute `reduce_scatter(x @ w, axis)`, one direction's sums while the other's are sent.

    Equation: `y[i] = split(sum_j x[j] @ w[j], n)[i]`. Products are added up in float32; what a
    device sends, n - 1 shards of the result, is rounded to x's dtype.

    Transpose: for x `ring_all_gather_matmul` of the cotangent and w's transpose; for w x's
    transpose times the gathered cotangent.

    Args:
      x: shape (n * rows, in), float32 or bfloat16: of the contracted dim this device's part.
      w: shape (in, out), x's dtype.
      axis: as for `ring_all_gather`.
      interpret: as for `ring_all_gather`.

    Returns:
      Shape (rows, out), x's dtype: this device's shard.

    Raises:
      NotImplementedError, TypeError, NameError, ValueError: as `ring_all_gather_matmul`.

    Example:
      >>> from jax.sharding import Mesh, PartitionSpec as P
      >>> from txcore import kernels
      >>> mesh = Mesh(jax.devices()[:2], "data")
      >>> product = jax.shard_map(
      ...     lambda x, w: kernels.ring_matmul_reduce_scatter(x, w, "data", interpret=True),
      ...     mesh=mesh, in_specs=(P(None, "data"), P("data")), out_specs=P("data"))
      >>> product(jnp.ones((6, 4)), jnp.ones((4, 10))).shape
      (6, 10)
    """
    x, w = _prepare("ring_matmul_reduce_scatter", x, w, axis, interpret)
    size = ring_size(axis)
    if x.shape[0] % size:
        raise ValueError(
            f"ring_matmul_reduce_scatter over {axis!r} needs rows of x divisible by {size}, got "
            f"shape {x.shape}: pad them to {round_up(x.shape[0], size)}"
        )
    return _product_scatter(x, w, axis, interpret) if size > 1 else _multiply(x, w)


def _prepare(
    op: str, x: ArrayLike, w: ArrayLike, axis: str, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    x, w = jnp.asarray(x), jnp.asarray(w)
    if x.dtype.name not in FLOATS or w.dtype != x.dtype:
        raise TypeError(
            f"{op} needs x and w of one dtype, {' or '.join(FLOATS)}, got {x.dtype} and {w.dtype}: "
            "cast them"
        )
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0] or 0 in (*x.shape, *w.shape):
        raise ValueError(
            f"{op} needs x of shape (rows, in) and w (in, out), none of them 0, got {x.shape} and "
            f"{w.shape}: reshape them"
        )
    check_ring(op, axis, interpret, x=x, w=w)
    x, w = varying.match_varying(x, w)
    is_equal = _compat.tracks_varying(axis) and axis not in _compat.varying_axes(x)
    if is_equal:
        x, w = (_compat.cast_to_varying(a, (axis,)) for a in (x, w))
    return x, w


def _multiply(x: jax.Array, w: jax.Array) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, w, precision=exact, preferred_element_type=jnp.float32).astype(x.dtype)


def _gather_and_keep(
    x: jax.Array, w: jax.Array, axis: str, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the product, and x gathered."""
    (rows, inner), columns, size = x.shape, w.shape[1], ring_size(axis)
    whole = (
        *(round_up(rows, 32 // x.dtype.itemsize), round_up(inner, LANES)),
        round_up(columns, LANES),
    )
    products, shards = gather_product(
        pad_matrix(x, *whole[:2]), pad_matrix(w, *whole[1:]), axis, interpret
    )
    product = products[:, :rows, :columns].reshape(size * rows, columns)
    return product, shards[:, :rows, :inner].reshape(size * rows, inner)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gather_product(x: jax.Array, w: jax.Array, axis: str, interpret: Any) -> jax.Array:
    return _gather_and_keep(x, w, axis, interpret)[0]


def _gather_product_forward(x: jax.Array, w: jax.Array, axis: str, interpret: Any) -> Any:
    product, gathered = _gather_and_keep(x, w, axis, interpret)
    return product, (gathered, w)


def _gather_product_backward(
    axis: str, interpret: Any, kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    gathered, w = kept
    return _product_scatter(g, w.T, axis, interpret), _multiply(gathered.T, g)


_gather_product.defvjp(_gather_product_forward, _gather_product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product_scatter(x: jax.Array, w: jax.Array, axis: str, interpret: Any) -> jax.Array:
    size, inner, columns = ring_size(axis), x.shape[1], w.shape[1]
    rows = x.shape[0] // size
    half = round_up(-(-rows // 2), 32 // x.dtype.itemsize)
    whole = round_up(inner, LANES), round_up(columns, LANES)
    shards = pad_matrix(x.reshape(size, rows, inner), 2 * half, whole[0])
    out = product_scatter(
        shards.reshape(size, 2, half, whole[0]), pad_matrix(w, *whole), axis, interpret
    )
    return out.reshape(2 * half, whole[1])[:rows, :columns]


def _product_scatter_forward(x: jax.Array, w: jax.Array, axis: str, interpret: Any) -> Any:
    return _product_scatter(x, w, axis, interpret), (x, w)


def _product_scatter_backward(
    axis: str, interpret: Any, kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    product, gathered = _gather_and_keep(g, w.T, axis, interpret)
    return product, _multiply(x.T, gathered)


_product_scatter.defvjp(_product_scatter_forward, _product_scatter_backward)
