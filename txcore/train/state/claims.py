"""What a step claims of its values: that gradients are reduced, and what leaves it is equal."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from txcore import _compat, varying
from txcore.collectives._leaves import names_of
from txcore.layout import Layout
from txcore.step_scope import StepScope

Shape = tuple[int, ...]


def claim_equal(
    value: jax.Array, axes: Iterable[str], *, split: Iterable[str] = (), what: str, error: str
) -> jax.Array:
    """Claim that a value is the same on all devices along some axes.

    Whether it is, the engine finds when it has the whole step; then it raises the error, if at
    all. jax's type alone does not tell: what it types as varying may be equal, and is typed so now.

    Args:
      value: what leaves the step, or goes into its optimizer.
      axes: the axes; those of `split` are left out.
      split: the axes over which the value is stored in parts, which it is typed as varying along.
      what: what errors call the value.
      error: the error's text, "{axis}" in it for the axes, "{source}" for the line.
    """
    own = frozenset(split)
    axes = tuple(axis for axis in axes if axis not in own)
    if parts := _compat.unreduced_axes(value) & {*axes}:  # of a sum: its type is certain
        names = names_of(sorted(parts))
        raise ValueError(error.replace(" ({source})", "").replace("{axis}", names))
    differing = _compat.varying_axes(value)
    drop, add = differing & {*axes}, own - differing
    return varying.claim(value, "equal", axes, what=what, error=error, drop=drop, add=add)


def check_gradients(grads: Any, params: Any, scope: StepScope, *, per_example: bool = False) -> Any:
    """Return gradients that are claimed to be laid out as the plan says; refuse other shapes.

    With `per_example` each has one dim more, the examples', in front.
    """
    given: Any = jax.tree.structure(grads)
    wanted: Any = jax.tree.structure(params)
    if given != wanted:
        raise ValueError(
            f"apply_gradients needs gradients with the structure of the parameters, {wanted}, "
            f"got {given}: pass the gradients that value_and_grad(...)(state.params) returned"
        )

    def check(path: Any, grad: Any, shape: Shape, layout: Layout) -> jax.Array:
        where = f"the gradient of params{jax.tree_util.keystr(path)}"
        _check_shape(where, shape, jnp.shape(grad), layout, per_example)
        return _claim_reduced(where, jnp.asarray(grad), layout, scope)

    shapes = wanted.unflatten(scope.gradient_shapes)
    return jax.tree_util.tree_map_with_path(check, grads, shapes, scope.layouts)


def _check_shape(
    where: str, wanted: Shape, given: Shape, layout: Layout, per_example: bool
) -> None:
    if given[int(per_example) :] == wanted and len(given) == len(wanted) + per_example:
        return
    part = f" (this device's part along {names_of(layout.norm_axes)})" if layout.norm_axes else ""
    examples = ", after a dim of examples (tx.all_gather(..., invariant=True))"
    remedy = ". Write grads, state = state.sync_gradients(grads) before apply_gradients"
    raise ValueError(
        f"apply_gradients needs {where} in its shape {wanted}{part}"
        f"{examples if per_example else ''}, got {given}{remedy if layout.scattered else ''}"
    )


def _claim_reduced(where: str, grad: jax.Array, layout: Layout, scope: StepScope) -> jax.Array:
    """Claim that a gradient is the same along all axes but those over which it is split."""
    head = (
        f"apply_gradients needs reduced gradients: {where} varies along axis {{axis}}, so it was "
        "never reduced there ({source})"
    )
    of_data = (
        f"{head}. Write grads = tx.pmean(grads, {{axis}}), or grads, state = "
        "state.sync_gradients(grads), before apply_gradients"
    )
    of_others = (
        f"{head}, and the plan stores its parameter whole. Where each device holds a part of the "
        "gradient, add them up: tx.psum(grad, {axis}); where each holds its part of the parameter, "
        "say so: Plan(params={path: PartitionSpec(...)})"
    )
    if layout.scattered is not None:
        grad = _claim_part(where, grad, layout.scattered[1])
    own = {*scope.left_out, *scope.own_axes}  # along which each device has another one
    axes = [axis for axis in _compat.bound_axes() if axis not in own]
    reduced = [axis for axis in axes if axis in layout.reduced]
    others = [axis for axis in axes if axis not in layout.reduced]
    if reduced:
        grad = claim_equal(grad, reduced, split=layout.norm_axes, what=where, error=of_data)
    if others:
        grad = claim_equal(grad, others, split=layout.norm_axes, what=where, error=of_others)
    return grad


def _claim_part(where: str, grad: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Claim that each device holds a part of its own of a gradient: what is reduced again doesn't.

    Zeros are as good on every device.
    """
    error = (
        f"apply_gradients needs this device's part of {where} along {{axis}}, got what is the same "
        "on every device ({source}): it was reduced once more after its parts were made. Remove "
        "that reduction: state.sync_gradients has done it"
    )
    missing = frozenset(axes) - _compat.varying_axes(grad)
    return varying.claim(grad, "part", axes, what=where, error=error, add=missing)
