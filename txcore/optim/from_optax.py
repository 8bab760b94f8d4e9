"""Optimizers made elsewhere; optax itself is not imported."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from txcore import _compat
from txcore.optim.optimizer import (
    Optimizer,
    check_like_params,
    refuse_parts,
    scale_gradients,
)
from txcore.trees import Grads, OptState, Params, PyTree


def from_optax(
    transformation: Any, *, elementwise: bool = False, per_example: bool = False
) -> Optimizer:
    """Make an optimizer of an optax GradientTransformation.

    Args:
      transformation: an object with optax's `init(params)` and `update(grads, state, params)`.
      elementwise: whether each element's update depends on that element alone. Only such a
        transformation may be used where each device holds a part of the gradients: optax's global
        norm, for one, would be the norm of each part by itself.
      per_example: whether it needs one gradient for each example of the global batch, as
        `optax.contrib.dpsgd` does. A step makes them by `jax.vmap(jax.grad(loss_of_one),
        (None, 0))(state.params, batch)` for the examples of a device, and gathers them by
        `tx.all_gather(grads, axis, invariant=True)`.

    Returns:
      The optimizer. Gradients are cast to the parameters' dtypes first; the state keeps its
      dtypes, so that no step compiles twice.

    Raises:
      TypeError: `transformation` has no `init` and `update`.

    Example:
      >>> import optax
      >>> import txcore as tx
      >>> optimizer = tx.optim.from_optax(optax.lion(1e-4), elementwise=True)
    """
    if not _is_transformation(transformation):
        raise TypeError(_describe_refusal("from_optax: transformation needs to be", transformation))

    def init(params: Params) -> OptState:
        with _standard_promotion():
            return jax.tree.map(_strengthen_type, transformation.init(params))

    def update(
        grads: Grads,
        opt_state: OptState,
        params: Params,
        *,
        step: jax.Array,
        grad_scale: ArrayLike = 1.0,
    ) -> tuple[Params, OptState]:
        # Per-example gradients have the examples in front: the first one's have a params' shape.
        one = jax.tree.map(lambda g: g[0], grads) if per_example else grads
        check_like_params("from_optax", "gradients", one, params)
        if not elementwise:
            refuse_parts(
                "from_optax",
                grads,
                "pass from_optax(..., elementwise=True) if each element's update depends on "
                "that element alone",
            )
        grads = jax.tree.map(_cast_like, scale_gradients(grads, grad_scale), params)
        with _standard_promotion():
            changes, new_state = transformation.update(grads, opt_state, params)
            _check_changes(changes, params)
            new_params = jax.tree.map(lambda p, c: _cast_like(p + c, p), params, changes)
        return new_params, jax.tree.map(_cast_like, new_state, opt_state)

    text = f"from_optax(<{type(transformation).__name__}>)"
    parts = elementwise and not per_example
    return Optimizer(init, update, per_example, handles_shards=parts, text=text)


def _check_changes(changes: PyTree, params: Params) -> None:
    """Refuse an update that would change the parameters' shapes."""
    for (path, change), param in zip(
        jax.tree_util.tree_leaves_with_path(changes), jax.tree.leaves(params), strict=True
    ):
        if jnp.shape(change) != jnp.shape(param):
            raise ValueError(
                f"from_optax: the transformation needs to return updates in the parameters' "
                f"shapes, got {jnp.shape(change)} for leaf "
                f"{jax.tree_util.keystr(path) or 'itself'}, whose parameter has "
                f"{jnp.shape(param)}: leave per_example=True to a transformation that takes the "
                "mean over the examples itself, such as optax.contrib.dpsgd"
            )


def as_optimizer(x: Any) -> Optimizer:
    """Return an optimizer for what a user gave as one.

    Args:
      x: an `Optimizer`, or any optax GradientTransformation.

    Returns:
      The optimizer.

    Raises:
      TypeError: `x` is neither.

    Example:
      >>> import optax
      >>> import txcore as tx
      >>> optimizer = tx.optim.as_optimizer(optax.adam(1e-3))
    """
    if isinstance(x, Optimizer):
        return x
    if _is_transformation(x):
        return from_optax(x)
    raise TypeError(_describe_refusal("optimizer needs to be a tx.optim optimizer or", x))


def _is_transformation(x: Any) -> bool:
    return callable(getattr(x, "init", None)) and callable(getattr(x, "update", None))


def _describe_refusal(required: str, given: Any) -> str:
    name = getattr(given, "__name__", None)
    if callable(given) and name is not None:
        return (
            f"{required} an optax GradientTransformation, got the function {name!r}: "
            f"call it with its options, for example {name}(0.01)"
        )
    return (
        f"{required} an optax GradientTransformation (with init and update), got "
        f"{given!r} ({type(given).__name__}): pass tx.optim.sgd(0.01), for example"
    )


@contextlib.contextmanager
def _standard_promotion() -> Iterator[None]:
    """Allow mixed dtypes and ranks, which optax's own code relies on, whatever jax is set to."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _strengthen_type(leaf: Any) -> jax.Array:
    # A weak type would become a strong one in the first update, and compile the step again.
    if _compat.is_key_array(leaf):
        return leaf
    return jnp.asarray(leaf, jnp.result_type(leaf))


def _cast_like(leaf: Any, like: Any) -> jax.Array:
    if _compat.is_key_array(leaf):
        return leaf
    return jnp.asarray(leaf, jnp.result_type(like))
