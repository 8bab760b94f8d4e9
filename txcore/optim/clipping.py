"""Clipping by the norm of all gradients together."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from txcore import kernels
from txcore.collectives import psum, vary
from txcore.kernels.common import checks
from txcore.optim import optimizer
from txcore.trees import Grads, PyTree


def global_norm(tree: PyTree) -> jax.Array:
    """Compute the Euclidean norm of all the leaves of a tree taken as one vector.

    Equation: `sqrt(sum_leaf psum(sum(leaf**2), axes))`, with the axes over which the plan splits
    the leaf. In a step whose plan splits parameters (`Plan(params=)`), the norm of a tree like
    the parameters is that of the whole tree, at the cost of one psum of a scalar for each set of
    axes. Everywhere else it is the norm of the leaves as this device holds them, and no
    collective is added.

    Args:
      tree: pytree of floating-point arrays, any shapes.

    Returns:
      Scalar, float32 or wider; 0 for an empty tree, inf or nan where the leaves are.

    Raises:
      ValueError: in such a step, a leaf of another tree varies along an axis over which the plan
        splits parameters: its norm may be that of a part.

    Example:
      >>> import jax.numpy as jnp
      >>> import txcore as tx
      >>> float(tx.optim.global_norm({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}))
      5.0
    """
    optimizer.refuse_unknown_parts("global_norm", tree)
    return _norm_of(tree, optimizer.split_axes_of(tree))


def _norm_of(tree: PyTree, axes_of_leaves: list[tuple[str, ...]]) -> jax.Array:
    """Return the norm of leaves that are split over these axes."""
    squares = [kernels.squared_norm(leaf) for leaf in jax.tree.leaves(tree)]
    dtype = checks.common_dtype(jnp.float32, *(square.dtype for square in squares))
    totals: dict[tuple[str, ...], jax.Array] = {(): jnp.zeros((), dtype)}
    for square, axes in zip(squares, axes_of_leaves, strict=True):
        totals[axes] = totals.get(axes, jnp.zeros((), dtype)) + square.astype(dtype)
    total = totals.pop(())
    for axes, own in totals.items():
        total = total + psum(vary(own, axes), axes, name="gradient_norm")
    return jnp.sqrt(total)


def clip_by_global_norm(tree: PyTree, max_norm: float, *, parts: bool = False) -> PyTree:
    """Scale a tree down to a global norm of `max_norm` where it is larger.

    A norm that is not finite makes every leaf NaN: scaling by max_norm / inf would turn the
    finite gradients of a diverged step into zeros, and hide it.

    Args:
      tree: pytree of floating-point arrays, any shapes.
      max_norm: above 0.
      parts: whether to clip what differs between devices, each device by the norm of its own
        part. The result then depends on the number of devices. It is not needed inside
        `jax.vmap`, where each example's gradient has its own norm, nor for leaves that the plan
        splits (see `global_norm`).

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
    whole: list[tuple[str, ...]] = [()] * len(jax.tree.leaves(tree))
    norm = _norm_of(tree, whole if parts else optimizer.split_axes_of(tree))
    factor = _clipping_factor(norm, max_norm)
    return jax.tree.map(lambda leaf: _scale_leaf(leaf, factor), tree)


def clipping_scale(
    op: str, grads: Grads, max_norm: float | None, grad_scale: ArrayLike = 1.0
) -> ArrayLike:
    """Return the factor that clips the gradients: the optimizer's own pass multiplies by it.

    Args:
      op: the optimizer's name, for the error.
      grads: the gradients, not multiplied by anything yet.
      max_norm: the largest norm of grad_scale * grads, or None not to clip. With a number, each
        gradient must be whole on this device, or split as the plan says.
      grad_scale: scalar that multiplies the gradients whether they are clipped or not.

    Returns:
      The product of `grad_scale` and the factor of `clip_by_global_norm`.

    Raises:
      ValueError: `max_norm` is given, and a device holds a part of the gradients that is not the
        plan's.
    """
    if max_norm is None:
        return grad_scale
    split = optimizer.split_axes_of(grads)
    optimizer.refuse_parts(
        f"{op}: clip_norm",
        grads,
        "leave clip_norm out and scale the gradients with tx.optim.clip_by_global_norm(..., "
        "parts=True) if the norm of each device's own part is meant",
        known=split,
    )
    scale, norm = jnp.asarray(grad_scale), _norm_of(grads, split)
    dtype = checks.common_dtype(scale.dtype, norm.dtype)
    scale = scale.astype(dtype)
    return scale * _clipping_factor(norm.astype(dtype) * abs(scale), max_norm)


def _scale_leaf(leaf: Any, factor: jax.Array) -> jax.Array:
    dtype = jnp.result_type(leaf)
    wide = checks.common_dtype(dtype, factor.dtype)
    return (jnp.asarray(leaf, wide) * factor.astype(wide)).astype(dtype)


def _clipping_factor(norm: jax.Array, max_norm: float) -> jax.Array:
    return jnp.where(jnp.isfinite(norm), jnp.minimum(1, max_norm / norm), jnp.nan)


def check_max_norm(op: str, option: str, max_norm: float | None) -> None:
    """Refuse a largest norm that is not above 0."""
    if max_norm is not None and not max_norm > 0:
        raise ValueError(
            f"{op}: {option} needs a number above 0, got {max_norm!r}: a usual value is 1.0"
            f"{', and None does not clip' if option == 'clip_norm' else ''}"
        )
