"""The public pack and unpack: what they take and what they refuse."""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from txcore import varying
from txcore.kernels.bucket import pallas, triton, xla
from txcore.kernels.common import checks
from txcore.kernels.dispatch import registry

PACK: registry.Kernels = {
    "xla": registry.Kernel(xla.pack),
    "pallas": registry.Kernel(pallas.pack, pallas.configs, pallas.refuse_pack),
    "triton": registry.Kernel(triton.pack, triton.configs, triton.refuse_pack),
}
UNPACK: registry.Kernels = {
    "xla": registry.Kernel(xla.unpack),
    "pallas": registry.Kernel(pallas.unpack, pallas.configs, pallas.refuse_unpack),
    "triton": registry.Kernel(triton.unpack, triton.configs, triton.refuse_unpack),
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
    to `scale`. XLA reduces a tree by one collective without a copy: packing pays for what needs
    one buffer, such as a reduce-scatter or a collective in another dtype.

    Args:
      arrays: pytree of arrays of any shapes and floating dtypes, along any mesh axes; the buffer
        varies along all that one of them varies along.
      dtype: floating dtype of the buffer; None for the dtype that all of them have.
      scale: scalar, a number or an array; None does not scale.
      implementation: None for the fastest known, "xla", "pallas" or "triton".

    Returns:
      Shape (number of all the elements,): the leaves in `jax.tree.leaves` order, each by rows. An
      empty tree gives shape (0,), in float32 if `dtype` is None.

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
    named = {_name("arrays", path): leaf for path, leaf in _leaves(arrays)}
    leaves = checks.float_arrays("pack", **named)
    to = _buffer_dtype(dtype, dict(zip(named, leaves, strict=True)))
    if not leaves:
        return jnp.zeros(0, to)
    return registry.run(  # type: ignore[no-any-return]
        "pack",
        PACK,
        *varying.match_varying(*leaves, *_scales("pack", scale, to, *leaves)),
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

    Each array is a view of its part for XLA to fuse into what uses it. The gradient with respect
    to the buffer is one concatenation of the arrays' gradients: flat parameters that are
    unpacked in the loss have flat gradients without packing them. No gradient flows to `scale`.

    Args:
      flat: shape (number of all the elements,), any floating dtype.
      like: pytree of arrays or of `jax.ShapeDtypeStruct`s, of floating dtypes.
      scale: scalar, a number or an array; None does not scale.
      implementation: None for the fastest known, "xla", "pallas" or "triton".

    Returns:
      The arrays, with the structure, shapes and dtypes of `like`; they vary along the mesh axes
      along which `flat` and `scale` do.

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
    (flat,) = checks.float_arrays("unpack", flat=flat)
    shapes = tuple(tuple(jnp.shape(leaf)) for _, leaf in _leaves(like))
    dtypes = tuple(_like_dtype(path, leaf) for path, leaf in _leaves(like))
    _check_size(flat, shapes)
    structure = jax.tree.structure(like)
    if not shapes:
        return jax.tree.unflatten(structure, [])
    arrays = registry.run(
        "unpack",
        UNPACK,
        *varying.match_varying(flat, *_scales("unpack", scale, flat.dtype, *dtypes)),
        implementation=implementation,
        shapes=shapes,
        dtypes=dtypes,
    )
    return jax.tree.unflatten(structure, arrays)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _name(tree: str, path: Any) -> str:
    return f"{tree}{jax.tree_util.keystr(path)}"


def _scales(op: str, scale: ArrayLike | None, *types: Any) -> tuple[jax.Array, ...]:
    """Return no operand, or the scale in the dtype in which the product is computed."""
    if scale is None:
        return ()
    if jnp.ndim(scale):
        raise ValueError(
            f"{op}: scale must be a scalar; got shape {jnp.shape(scale)}. Multiply the arrays "
            "themselves to scale each differently."
        )
    wide = checks.accumulator(checks.common_dtype(*map(jnp.result_type, types)))
    return (jax.lax.stop_gradient(jnp.asarray(scale, wide)),)


def _buffer_dtype(dtype: DTypeLike | None, named: dict[str, jax.Array]) -> jnp.dtype:
    if dtype is None:
        given = {str(leaf.dtype): name for name, leaf in named.items()}
        if len(given) > 1:
            raise TypeError(
                "pack: without dtype= all arrays must have one dtype; got "
                f"{', '.join(f'{name} {kind}' for kind, name in given.items())}. Pass the "
                "buffer's dtype, for example dtype=jnp.float32."
            )
        return jnp.dtype(next(iter(given), "float32"))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"pack: dtype must be a floating-point dtype or None; got {jnp.dtype(dtype)}. "
            "Use jnp.concatenate for others."
        )
    return jnp.dtype(dtype)


def _like_dtype(path: Any, leaf: Any) -> str:
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"unpack: {_name('like', path)} must have a floating-point dtype; got {dtype}. "
            "Keep what is not floating-point out of the buffer."
        )
    return str(dtype)


def _check_size(flat: jax.Array, shapes: tuple[tuple[int, ...], ...]) -> None:
    wanted = (sum(map(prod, shapes)),)
    if flat.shape != wanted:
        raise ValueError(
            f"unpack: flat must have the shape {wanted}, all elements of like; got {flat.shape}. "
            "Pass the tree that was packed, or shapes like its own; leave padding out."
        )
