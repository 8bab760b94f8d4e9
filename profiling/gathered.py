"""Find reductions of a value that was gathered along the same axis: they multiply by its size.

jax types the result of an all_gather as varying, though it is equal on all devices along the
axis; so a psum of it is legal and silently n times too large. Types cannot tell; the walk can.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from txcore import _compat
from txcore.profiling import source
from txcore.profiling.along import GATHERS, Along, Seen, search
from txcore.profiling.jaxpr import made_by_autodiff
from txcore.profiling.values import is_literal

_REDUCTIONS = ("psum", "psum_invariant", "reduce_scatter")


@dataclass(frozen=True)
class Finding:
    """A reduction along `axis` of a gathered value: its tag, jax primitive and "file.py:12"."""

    tag: str | None
    axis: str
    primitive: str
    source: str


def reductions_of_gathered(jaxpr: Any) -> list[Finding]:
    """Find the sums along an axis of values that an all_gather made equal along it.

    Means, and the reductions that autodiff makes (the transpose of a gather is one), are right
    and left out. What the walk does not know counts as different on each device: no false alarm.

    Args:
      jaxpr: a Jaxpr or ClosedJaxpr with shard_maps in it.

    Returns:
      One finding for each equation and axis.
    """
    return search(jaxpr, _wrong_sum, only_with=GATHERS)


def _wrong_sum(seen: Seen) -> Finding | None:
    if seen.name not in _REDUCTIONS or seen.place.axis not in seen.axes:
        return None
    if seen.eqn.params.get("axis_index_groups") is not None:
        return None
    if (
        max(seen.inputs) is not Along.GATHERED
        or made_by_autodiff(seen.place.path)
        or _is_mean(seen)
    ):
        return None
    place = source.shorten(_compat.eqn_frames(seen.eqn))
    return Finding(_compat.tag_in(seen.place.path), seen.place.axis, seen.name, place)


def _is_mean(seen: Seen) -> bool:
    if (_compat.tag_in(seen.place.path) or "").startswith("pmean/"):
        return True
    count = math.prod(seen.place.sizes.get(axis, 1) for axis in seen.axes)
    divisors = _divisors(seen.jaxpr)
    return all(divisors.get(out) == count for out in seen.eqn.outvars)  # jax.lax.pmean


def _divisors(jaxpr: Any) -> dict[Any, float]:
    """Return of each value that is only ever divided by one number, that number."""
    variables = [v for eqn in jaxpr.eqns for v in eqn.invars] + list(jaxpr.outvars)
    uses = Counter(v for v in variables if not is_literal(v))
    divided = (eqn.invars for eqn in jaxpr.eqns if eqn.primitive.name == "div")
    return {
        value: float(by.val)
        for value, by in divided
        if is_literal(by) and not is_literal(value) and uses[value] == 1
    }
