"""What a traced step is refused for: sums, means and results that are not what they are taken for.

What differs along an axis is found by following the data through the traced program; jax's types
say it only roughly. Which error a value meets is written where the value is made.
"""

from typing import TYPE_CHECKING, Any

from txcore.collectives._leaves import names_of
from txcore.mesh import MeshSpec

if TYPE_CHECKING:
    from txcore.profiling.declared.gathered_sums import Finding

_REDUCTIONS = {
    "gathered": (
        "{op} reduces a value that tx.all_gather made equal on every device, which multiplies it "
        "by {size}. Remove the reduction: compute with the gathered value directly, and use "
        "tx.all_gather(..., invariant=True) where it leaves the step (a mean of it: tx.pmean)"
    ),
    "equal": (
        "{op} sums a value that is the same on every device, which multiplies it by {size}: it is "
        "reduced already, or made of the state alone. Remove the sum, or take tx.pmean; where the "
        "sum is meant, say so with tx.psum(tx.vary(x, {axis}), {axis})"
    ),
    "again": (
        "{op} sums a value that holds a sum over the devices as one of its terms, which "
        "multiplies that term by {size} (in a loop, the carry that the trip before has summed). "
        "Sum the local values alone, and add the term afterwards: total + tx.psum(local, {axis})"
    ),
    "multiplied": (
        "{op} sums gradients of a loss that is the same on every device, since it was gathered or "
        "reduced: each device's hold the others' too, and the sum is {size} times the gradient. "
        "Take their mean: tx.pmean(grads, {axis})"
    ),
    "part": (
        "{op} averages gradients of a loss that is reduced already: each device holds a part, "
        "whose sum is the gradient, and the mean is 1/{size} of it. Differentiate the local loss "
        "with tx.value_and_grad, and apply tx.pmean(..., {axis}) to loss and gradients afterwards"
    ),
    "typed": (
        "{op} reduces gradients that autodiff has summed over the devices on their way back, "
        "through a value that differs though jax types it as the same{mistyped}. Cast what it is "
        "made of first: tx.vary(x, {axis}) of each operand or initial value"
    ),
}
_PRIMITIVES = {
    "psum": "jax.lax.psum",
    "psum_invariant": "jax.lax.psum",
    "reduce_scatter": "jax.lax.psum_scatter",
}
_TOTAL = (
    "{what}{source} is made of gradients that autodiff summed over axis {axis}, {size} times those "
    "of the mean loss: what was differentiated does not vary along it, or was cast by tx.vary "
    "inside the function. Differentiate state.params, whose gradients come out local, and reduce "
    "them once: grads = tx.pmean(grads, {axis})"
)


def check_reductions(findings: list["Finding"], jaxpr: Any, mesh: MeshSpec) -> None:
    """Refuse a wrong reduction or a false claim."""
    wrong = [found for found in findings if found.problem != "total"]
    if not wrong:
        return
    first = wrong[0]
    axis = repr(first.axis)
    if first.problem != "claim":
        op = f"{first.tag or _PRIMITIVES[first.primitive]} over axis {axis} ({first.source})"
        text = _REDUCTIONS[first.problem]
        words = {"op": op, "axis": axis, "size": mesh.shape[first.axis]}
        raise ValueError(
            _fill_words(text, mistyped=_find_mistyped_operation(jaxpr, [first.axis]), **words)
        )
    alike = [f for f in wrong if (f.what, f.error, f.source) == _list_words(first)]
    axes = list(dict.fromkeys(f.axis for f in alike))
    size = mesh.shape[axes[0]]
    text = _fill_words(first.error, axis=names_of(axes), size=size, source=first.source)
    typed = "" if first.dropped else _find_mistyped_operation(jaxpr, axes)
    raise ValueError(text + typed)


def check_totals(findings: list["Finding"], mesh: MeshSpec) -> None:
    """Refuse gradients that autodiff summed, where they leave the step."""
    for found in findings:
        if found.problem == "total":
            # The line says something where the user's own call made the claim.
            source = f" ({found.source})" if "{source}" in found.error else ""
            words = {"what": found.what, "source": source, "axis": repr(found.axis)}
            raise ValueError(_fill_words(_TOTAL, size=mesh.shape[found.axis], **words))


def _list_words(found: "Finding") -> tuple[str, str, str]:
    return found.what, found.error, found.source


def _fill_words(text: str, **words: object) -> str:
    """Fill in a text's words; what else stands in braces (a path's key) is left alone."""
    for name, word in words.items():
        text = text.replace("{" + name + "}", str(word))
    return text


def _find_mistyped_operation(jaxpr: Any, axes: list[str]) -> str:
    """Return which operation jax types wrongly along these axes, in parentheses, or nothing."""
    from txcore.profiling.declared.gathered_sums import find_mistyped  # as in compile.py

    for found in find_mistyped(jaxpr):
        if found.axis in axes:
            return (
                f" (jax types what {found.operation} at {found.source or '?'} makes of local data "
                f"as the same on every device: it is not; tx.broadcast and tx.pmax of it need "
                f"tx.vary(x, {found.axis!r}) first)"
            )
    return ""
