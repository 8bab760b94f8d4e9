"""Find the errors that jax's types allow: doubled sums, means of parts, false claims.

jax types the result of an all_gather, or of a cast, as varying though it is equal on all devices
along the axis: a psum of it is legal and silently n times too large. It types the result of an
argsort as equal though it differs. Types cannot tell; the walk can.
"""

from dataclasses import dataclass
from typing import Any

from txcore import _compat, varying
from txcore.profiling.declared import relation, source
from txcore.profiling.declared.axis_dataflow import Seen, search_equations
from txcore.profiling.declared.equations import SUMS, Jaxpr, Var, open_jaxpr
from txcore.profiling.declared.relation import Relation, may_differ


@dataclass(frozen=True)
class Finding:
    """A reduction along `axis` of something that it is wrong for, or a false claim.

    Attributes:
      problem: "gathered": a sum of what an all_gather made equal; "equal": of what is equal;
        "again": of what holds a sum along the axis as a term; "multiplied": a sum of gradients that
        hold each device's part n times already; "part": a mean of gradients of a loss that is
        reduced already; "typed": a reduction of gradients that went back through a value that
        differs, and that jax types as equal; "claim": a claim (`varying.claim`) that does not hold;
        "total": what is claimed to be equal is a gradient that autodiff summed.
      tag, axis, primitive: of the reduction; primitive is "claim" for a claim.
      source: "file.py:12".
      what, error: those of a claim; dropped: whether it retypes the value as equal.
    """

    tag: str | None
    axis: str
    primitive: str
    source: str
    problem: str = "gathered"
    what: str = ""
    error: str = ""
    dropped: bool = False


@dataclass(frozen=True)
class Mistyped:
    """An operation whose result jax types as equal along `axis` though it is made of local data."""

    axis: str
    operation: str
    source: str


def find_wrong_reductions(jaxpr: Jaxpr) -> list[Finding]:
    """Find the reductions and the claims that are wrong along an axis, which types cannot tell.

    The reductions that autodiff makes (the transpose of a gather is one) are left out. What the
    walk does not know counts as right, so that nothing is a false alarm.

    Args:
      jaxpr: a Jaxpr or ClosedJaxpr with shard_maps in it.

    Returns:
      One finding for each equation and axis.
    """
    return search_equations(_compat.live_jaxpr(open_jaxpr(jaxpr)), _find_in_equation)


def find_mistyped(jaxpr: Jaxpr) -> list[Mistyped]:
    """Find the operations on local data whose results jax types as equal on all devices."""

    def find_in_equation(seen: Seen) -> Mistyped | None:
        axis = seen.axis
        if seen.name == varying.CLAIM or axis in seen.axes or not seen.frame.tracked:
            return None
        made = zip(seen.eqn.outvars, seen.outputs, strict=True)
        wrong = any(v & relation.DIFFERS and not _is_typed_varying(var, axis) for var, v in made)
        if not wrong or not any(_is_typed_varying(var, axis) for var in seen.eqn.invars):
            return None
        # What stands inside jnp.argsort has no line of the user's: the call of it has.
        name = str(seen.eqn.params.get("name", seen.name))
        return Mistyped(axis, name, source.user_source_line(_compat.eqn_frames(seen.eqn)))

    found = search_equations(jaxpr, find_in_equation, every=True)
    return [m for m in found if m.source] or found


def _is_typed_varying(var: Var, axis: str) -> bool:
    return axis in _compat.varying_axes_of(var.aval)


def _find_in_equation(seen: Seen) -> Finding | None:
    if seen.name == varying.CLAIM:
        return _find_false_claim(seen)
    if seen.name not in SUMS or seen.axis not in seen.axes or seen.by_autodiff:
        return None
    if seen.eqn.params.get("axis_index_groups") is not None:
        return None
    for value, var in zip(seen.inputs, seen.eqn.outvars, strict=False):
        if (problem := _name_problem(seen, value, var)) is not None:
            return _make_finding(seen, problem, tag=seen.tag)
    return None


def _name_problem(seen: Seen, value: Relation, var: Var) -> str | None:
    if value & relation.SUMMED and may_differ(value):
        return "typed"
    if (seen.tag or "").split("/")[0] == "pmean" or seen.is_divided(var):
        return "part" if value & relation.PART and may_differ(value) else None
    if value & relation.MULTIPLIED:
        return "multiplied"
    if may_differ(value):
        return "again" if value & relation.HOLDS_SUM else None
    if value & relation.ASKED or not value & relation.DEPENDS:
        return None
    return "gathered" if value & relation.GATHERED else "equal"


def _find_false_claim(seen: Seen) -> Finding | None:
    params, axis, (value,) = seen.eqn.params, seen.axis, seen.inputs
    if axis not in params["mesh_axes"]:
        return None
    if params["kind"] in (varying.MEAN, varying.MEAN_SHARD):
        return _find_wrong_mean(seen, value)
    if params["kind"] in (varying.SUM, varying.GATHERED):
        return None  # of a kernel, which has done it
    dropped = axis in params["drop"]
    wrong = {
        "equal": bool(value & relation.DIFFERS) or (dropped and may_differ(value)),
        "differs": not may_differ(value),
        "part": not (may_differ(value) or relation.is_zero(value)),
        "whole": bool(value & relation.SLICED),
    }[params["kind"]]
    if not wrong and not (params["kind"] == "equal" and value & relation.TOTAL):
        return None
    said = {"what": params["what"], "error": params["error"], "dropped": dropped}
    return _make_finding(seen, "claim" if wrong else "total", **said)


def _find_wrong_mean(seen: Seen, value: Relation) -> Finding | None:
    """Find what is wrong of a mean that an algorithm of several steps has made, as of a pmean."""
    if value & relation.SUMMED and may_differ(value):
        return _make_finding(seen, "typed", tag=seen.tag)
    if value & relation.PART and may_differ(value):
        return _make_finding(seen, "part", tag=seen.tag)
    return None


def _make_finding(seen: Seen, problem: str, *, tag: str | None = None, **said: Any) -> Finding:
    place = source.user_source_line(_compat.eqn_frames(seen.eqn))
    return Finding(tag, seen.axis, seen.name, place, problem, **said)
