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


def from_optax(
    transformation: Any, *, elementwise: bool = False, per_example: bool = False
) -> Optimizer:
    """Make an optimizer of an optax GradientTransformation.

    Args:
      transformation: an object with optax's `init(params)` and `update(grads, state, params)`.
      elementwise: whether each element's update depends on that element alone. Say so to use
        it on gradients of which each device holds a part: optax's global norm, for one, would
        be that of each part by itself.
      per_example: whether it needs one gradient for each example of the global batch, as
        `optax.contrib.dpsgd` does: those of this device, `jax.vmap(jax.grad(loss_of_one),
        (None, 0))(state.params, batch)`, gathered by `tx.all_gather(grads, axis, invariant=True)`.

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
        raise TypeError(_refusal("from_optax: transformation must be", transformation))

    def init(params: Any) -> Any:
        with _standard_promotion():
            return jax.tree.map(_strong, transformation.init(params))

    def update(
        grads: Any, opt_state: Any, params: Any, *, step: jax.Array, grad_scale: ArrayLike = 1.0
    ) -> tuple[Any, Any]:
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


def _check_changes(changes: Any, params: Any) -> None:
    """Refuse an update that would change the parameters' shapes."""
    for (path, change), param in zip(
        jax.tree_util.tree_leaves_with_path(changes), jax.tree.leaves(params), strict=True
    ):
        if jnp.shape(change) != jnp.shape(param):
            raise ValueError(
                f"from_optax: the transformation must return updates in the parameters' shapes; "
                f"leaf {jax.tree_util.keystr(path) or 'itself'} came out as {jnp.shape(change)}, "
                f"its parameter has {jnp.shape(param)}. per_example=True is for one that takes the "
                "mean over the examples itself, such as optax.contrib.dpsgd."
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
    raise TypeError(_refusal("optimizer must be a tx.optim optimizer or", x))


def _is_transformation(x: Any) -> bool:
    return callable(getattr(x, "init", None)) and callable(getattr(x, "update", None))


def _refusal(required: str, given: Any) -> str:
    name = getattr(given, "__name__", None)
    if callable(given) and name is not None:
        return (
            f"{required} an optax GradientTransformation; got the function {name!r}. "
            f"Call it with its options, for example {name}(0.01)."
        )
    return (
        f"{required} an optax GradientTransformation (with init and update); got "
        f"{type(given).__name__}: {given!r}. Pass tx.optim.sgd(0.01), for example."
    )


@contextlib.contextmanager
def _standard_promotion() -> Iterator[None]:
    """Let code of others compute by the rules that it is written for: optax's own mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _strong(leaf: Any) -> jax.Array:
    # A weak type would become a strong one in the first update, and compile the step again.
    if _compat.is_key_array(leaf):
        return leaf
    return jnp.asarray(leaf, jnp.result_type(leaf))


def _cast_like(leaf: Any, like: Any) -> jax.Array:
    if _compat.is_key_array(leaf):
        return leaf
    return jnp.asarray(leaf, jnp.result_type(like))
