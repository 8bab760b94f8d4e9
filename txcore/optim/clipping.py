"""Clipping by the norm of all gradients together."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from txcore import kernels
from txcore.kernels.common import checks
from txcore.optim import optimizer


def global_norm(tree: Any) -> jax.Array:
    """Compute the Euclidean norm of all the leaves of a tree taken as one vector.

    It is that of the leaves as this device holds them: no collective is added.

    Args:
      tree: pytree of floating-point arrays, any shapes.

    Returns:
      Scalar, float32 or wider; 0 for an empty tree, inf or nan where the leaves are.

    Example:
      >>> import jax.numpy as jnp
      >>> import txcore as tx
      >>> float(tx.optim.global_norm({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}))
      5.0
    """
    squares = [kernels.squared_norm(leaf) for leaf in jax.tree.leaves(tree)]
    dtype = checks.common_dtype(jnp.float32, *(square.dtype for square in squares))
    total = jnp.zeros((), dtype)
    for square in squares:
        total = total + square.astype(dtype)
    return jnp.sqrt(total)


def clip_by_global_norm(tree: Any, max_norm: float, *, parts: bool = False) -> Any:
    """Scale a tree down to a global norm of `max_norm` where it is larger.

    A norm that is not finite makes every leaf NaN: scaling by max_norm / inf would turn the
    finite gradients of a diverged step into zeros, and hide it.

    Args:
      tree: pytree of floating-point arrays, any shapes.
      max_norm: above 0.
      parts: clip what differs between devices, each by the norm of its own part; gradients that
        are not reduced yet would come out otherwise on another number of devices. Inside
        `jax.vmap`, as for the gradient of each example, it need not be said.

    Returns:
      The tree, each leaf in its own dtype.

    Raises:
      ValueError: `max_norm` is not above 0, or the devices hold different trees.

    Example:
      >>> import jax.numpy as jnp
      >>> import txcore as tx
      >>> tx.optim.clip_by_global_norm(jnp.array([3.0, 4.0]), 1.0).round(3).tolist()
      [0.6000000238418579, 0.800000011920929]

    References:
      Pascanu et al., "On the difficulty of training recurrent neural networks", 2013.
    """
    check_max_norm("clip_by_global_norm", "max_norm", max_norm)
    if not parts:
        tree = optimizer.claim_whole(
            "clip_by_global_norm", tree, "pass parts=True if each device's own norm is meant"
        )
    factor = _factor(global_norm(tree), max_norm)
    return jax.tree.map(lambda leaf: _scaled(leaf, factor), tree)


def clipping_scale(
    op: str, grads: Any, max_norm: float | None, grad_scale: ArrayLike = 1.0
) -> ArrayLike:
    """Return what gradients are to be multiplied by, so that no pass of its own clips them.

    Args:
      op: the optimizer's name, for the error.
      grads: the gradients, not multiplied by anything yet.
      max_norm: the largest norm of grad_scale * grads, or None not to clip; where it is given,
        the gradients must be whole on this device.
      grad_scale: scalar that the gradients are to be multiplied by in any case.

    Returns:
      The product of `grad_scale` and the factor of `clip_by_global_norm`.

    Raises:
      ValueError: `max_norm` is given, and a device holds a part of the gradients.
    """
    if max_norm is None:
        return grad_scale
    optimizer.refuse_parts(
        f"{op}: clip_norm",
        grads,
        "leave clip_norm out and scale the gradients with tx.optim.clip_by_global_norm(..., "
        "parts=True) if the norm of each device's own part is meant",
    )
    scale, norm = jnp.asarray(grad_scale), global_norm(grads)
    dtype = checks.common_dtype(scale.dtype, norm.dtype)
    scale = scale.astype(dtype)
    return scale * _factor(norm.astype(dtype) * abs(scale), max_norm)


def _scaled(leaf: Any, factor: jax.Array) -> jax.Array:
    dtype = jnp.result_type(leaf)
    wide = checks.common_dtype(dtype, factor.dtype)
    return (jnp.asarray(leaf, wide) * factor.astype(wide)).astype(dtype)


def _factor(norm: jax.Array, max_norm: float) -> jax.Array:
    return jnp.where(jnp.isfinite(norm), jnp.minimum(1, max_norm / norm), jnp.nan)


def check_max_norm(op: str, option: str, max_norm: float | None) -> None:
    """Refuse a largest norm that is not above 0."""
    if max_norm is not None and not max_norm > 0:
        raise ValueError(
            f"{op}: {option} must be above 0; got {max_norm!r}. A usual value is 1.0"
            f"{'; None does not clip' if option == 'clip_norm' else ''}."
        )
