"""The public pack and unpack: what they take and what they refuse."""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from txcore import varying
from txcore.kernels.bucket import jax_triton_buckets, mosaic, pallas, triton, xla
from txcore.kernels.common import checks
from txcore.kernels.dispatch import registry

PACK: registry.Kernels = {
    "xla": registry.Kernel(xla.pack),
    "pallas_triton": registry.Kernel(pallas.pack, pallas.list_configs, pallas.refuse_pack),
    "mosaic_tpu": registry.Kernel(mosaic.pack, mosaic.list_configs, mosaic.refuse_pack),
    "triton_ir": registry.Kernel(triton.pack, triton.list_configs, triton.refuse_pack),
    "jax_triton": registry.Kernel(
        jax_triton_buckets.pack, jax_triton_buckets.list_configs, jax_triton_buckets.refuse_pack
    ),
}
UNPACK: registry.Kernels = {
    "xla": registry.Kernel(xla.unpack),
    "pallas_triton": registry.Kernel(pallas.unpack, pallas.list_configs, pallas.refuse_unpack),
    "mosaic_tpu": registry.Kernel(mosaic.unpack, mosaic.list_configs, mosaic.refuse_unpack),
    "triton_ir": registry.Kernel(triton.unpack, triton.list_configs, triton.refuse_unpack),
    "jax_triton": registry.Kernel(
        jax_triton_buckets.unpack, jax_triton_buckets.list_configs, jax_triton_buckets.refuse_unpack
    ),
}


def pack(
    arrays: Any,
    *,
    dtype: DTypeLike | None = None,
    scale: ArrayLike | None = None,
    implementation: registry.Implementation | None = None,
) -> jax.Array:
    """Copy arrays one after the other into one flat buffer, cast and scaled in the same pass.

    The product with `scale` is computed in float32 or wider and rounded once. No gradient flows
    to `scale`. An all-reduce of a tree needs no packing, since XLA makes one collective of it
    without a copy. Packing pays where one buffer is needed: a reduce-scatter, or a collective in
    another dtype.

    Args:
      arrays: pytree of arrays of any shapes and floating dtypes. The buffer varies along every
        mesh axis that one of them varies along.
      dtype: floating dtype of the buffer; None for the dtype that all arrays have.
      scale: scalar, a number or an array; None does not scale.
      implementation: None for the fastest known, or a back end by name: "xla", or "pallas" for the
        platform's Pallas kernel (`txcore.kernels.dispatch.back_ends` lists all).

    Returns:
      Shape (number of elements,): the leaves in the order of `jax.tree.leaves`, each in row-major
      order. An empty tree gives shape (0,), in float32 if `dtype` is None.

    Raises:
      TypeError: a leaf or `dtype` is not floating-point, or the dtypes differ without `dtype`.
      ValueError: `scale` is not a scalar, or there is no implementation of that name.
      NotImplementedError: the implementation cannot run this.

    Example:
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> kernels.pack({"b": jnp.ones(1), "w": jnp.ones((2, 2))}, scale=0.5).tolist()
      [0.5, 0.5, 0.5, 0.5, 0.5]
    """
    named = {_name_leaf("arrays", path): leaf for path, leaf in _leaves_with_paths(arrays)}
    leaves = checks.require_floats("pack", **named)
    to = _buffer_dtype(dtype, dict(zip(named, leaves, strict=True)))
    if not leaves:
        return jnp.zeros(0, to)
    return registry.run_op(  # type: ignore[no-any-return]
        "pack",
        PACK,
        *varying.match_varying(*leaves, *_check_scale("pack", scale, to, *leaves)),
        implementation=implementation,
        dtype=str(to),
        scaled=scale is not None,
    )


def unpack(
    flat: ArrayLike,
    like: Any,
    *,
    scale: ArrayLike | None = None,
    implementation: registry.Implementation | None = None,
) -> Any:
    """Split a flat buffer into arrays, each cast and scaled: the inverse of `pack`.

    Each array is a slice of the buffer, which XLA fuses into what uses it. The gradient with
    respect to the buffer is one concatenation of the arrays' gradients: a loss that unpacks flat
    parameters has flat gradients, and nothing is packed. No gradient flows to `scale`.

    Args:
      flat: shape (number of elements,), any floating dtype.
      like: pytree of arrays or of `jax.ShapeDtypeStruct`s, of floating dtypes.
      scale: scalar, a number or an array; None does not scale.
      implementation: None for the fastest known, or a back end by name: "xla", or "pallas" for the
        platform's Pallas kernel (`txcore.kernels.dispatch.back_ends` lists all).

    Returns:
      The arrays, with the structure, shapes and dtypes of `like`. They vary along the mesh axes
      that `flat` or `scale` varies along.

    Raises:
      TypeError: `flat` or a leaf of `like` is not floating-point.
      ValueError: `flat` is not flat or has another size than `like`, `scale` is not a scalar, or
        there is no implementation of that name.
      NotImplementedError: the implementation cannot run this.

    Example:
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> params = {"b": jnp.zeros(1), "w": jnp.zeros((2, 2))}
      >>> kernels.unpack(jnp.arange(5.0), params)["w"].tolist()
      [[1.0, 2.0], [3.0, 4.0]]
    """
    (flat,) = checks.require_floats("unpack", flat=flat)
    shapes = tuple(tuple(jnp.shape(leaf)) for _, leaf in _leaves_with_paths(like))
    dtypes = tuple(_like_dtype(path, leaf) for path, leaf in _leaves_with_paths(like))
    _check_size(flat, shapes)
    structure = jax.tree.structure(like)
    if not shapes:
        return jax.tree.unflatten(structure, [])
    arrays = registry.run_op(
        "unpack",
        UNPACK,
        *varying.match_varying(flat, *_check_scale("unpack", scale, flat.dtype, *dtypes)),
        implementation=implementation,
        shapes=shapes,
        dtypes=dtypes,
    )
    return jax.tree.unflatten(structure, arrays)


def _leaves_with_paths(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _name_leaf(tree: str, path: Any) -> str:
    return f"{tree}{jax.tree_util.keystr(path)}"


def _check_scale(op: str, scale: ArrayLike | None, *types: Any) -> tuple[jax.Array, ...]:
    """Return the scale as an operand in the dtype of the product, or no operand without one."""
    if scale is None:
        return ()
    if jnp.ndim(scale):
        raise ValueError(
            f"{op}: scale needs to be a scalar, got shape {jnp.shape(scale)}: multiply the arrays "
            "themselves to scale each by its own factor"
        )
    wide = checks.accumulator(checks.common_dtype(*map(jnp.result_type, types)))
    return (jax.lax.stop_gradient(jnp.asarray(scale, wide)),)


def _buffer_dtype(dtype: DTypeLike | None, named: dict[str, jax.Array]) -> jnp.dtype:
    if dtype is None:
        given = {str(leaf.dtype): name for name, leaf in named.items()}
        if len(given) > 1:
            raise TypeError(
                "pack: without dtype= all arrays need one dtype, got "
                f"{', '.join(f'{name} {kind}' for kind, name in given.items())}: pass the "
                "buffer's dtype, for example dtype=jnp.float32"
            )
        return jnp.dtype(next(iter(given), "float32"))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"pack: dtype needs a floating-point dtype or None, got {jnp.dtype(dtype)}: "
            "use jnp.concatenate for others"
        )
    return jnp.dtype(dtype)


def _like_dtype(path: Any, leaf: Any) -> str:
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"unpack: {_name_leaf('like', path)} needs a floating-point dtype, got {dtype}: "
            "keep what is not floating-point out of the buffer"
        )
    return str(dtype)


def _check_size(flat: jax.Array, shapes: tuple[tuple[int, ...], ...]) -> None:
    wanted = (sum(map(prod, shapes)),)
    if flat.shape != wanted:
        raise ValueError(
            f"unpack: flat needs the shape {wanted}, all elements of like, got {flat.shape}: "
            "pass the tree that was packed, or shapes like its own, and leave padding out"
        )
