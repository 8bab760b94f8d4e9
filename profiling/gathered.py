"""Find reductions of a value that was gathered along the same axis: they multiply by its size.

jax types the result of an all_gather as varying, though it is equal on all devices along the
axis; so a psum of it is legal and silently n times too large. Types cannot tell; this walk can.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from txcore import _compat
from txcore.profiling import meshes, source
from txcore.profiling.jaxpr import axes_of, made_by_autodiff, path_of, sub_jaxprs
from txcore.profiling.values import is_literal

_GATHERS = ("all_gather", "all_gather_invariant", "all_gather_reduced")
_REDUCTIONS = ("psum", "psum_invariant", "reduce_scatter")
_SAME_AFTER = ("psum", "psum_invariant", "pmax", "pmin", "pbroadcast")
_KEEP = ("pvary", "pcast", "vary_unreduced_cast")


class _Along(IntEnum):
    """How a value relates to one axis; the larger wins where values meet."""

    SAME = 0  # equal on all devices along it
    GATHERED = 1  # equal too, and made from an all_gather along it
    DIFFERS = 2  # not known to be equal


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
    return list(dict.fromkeys(_search(getattr(jaxpr, "jaxpr", jaxpr), "")))


def _search(jaxpr: Any, path: str) -> Iterator[Finding]:
    for eqn in jaxpr.eqns:
        inner_path = path_of(eqn, path)
        for inner in sub_jaxprs(eqn):
            if eqn.primitive.name == "shard_map":
                yield from _in_shard_map(eqn, inner, inner_path)
            else:
                yield from _search(inner, inner_path)


def _in_shard_map(eqn: Any, body: Any, path: str) -> Iterator[Finding]:
    sizes = dict(meshes.sizes_of(eqn.params["mesh"]))
    for axis in sizes:
        walk = _Walk(axis, sizes, path, {}, {})
        # An argument whose spec does not name the axis is the same along it.
        walk.run(body, [_of_spec(spec, axis) for spec in eqn.params["in_specs"]])
        yield from walk.findings.values()


def _of_spec(spec: Any, axis: str) -> _Along:
    names = [n for part in spec for n in (part if isinstance(part, tuple) else (part,))]
    return _Along.DIFFERS if axis in names else _Along.SAME


@dataclass(frozen=True)
class _Walk:
    """A forward walk for one axis of a mesh of `sizes`.

    path: the jax transformations around the jaxpr that is walked.
    findings: by the id of the equation that was found.
    divisors: of each value that is only ever divided by one number, that number.
    """

    axis: str
    sizes: dict[str, int]
    path: str
    findings: dict[int, Finding]
    divisors: dict[Any, float]

    def run(self, jaxpr: Any, inputs: Sequence[_Along]) -> list[_Along]:
        """Return how a jaxpr's outputs relate to the axis, from how its inputs do."""
        known: dict[Any, _Along] = dict.fromkeys(jaxpr.constvars, _Along.SAME)
        known.update(zip(jaxpr.invars, inputs, strict=True))
        self.divisors.update(_divisors(jaxpr))

        def read(var: Any) -> _Along:
            return _Along.SAME if is_literal(var) else known.get(var, _Along.DIFFERS)

        for eqn in jaxpr.eqns:
            outputs = self._eqn(eqn, [read(v) for v in eqn.invars])
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _eqn(self, eqn: Any, inputs: list[_Along]) -> list[_Along]:
        name = eqn.primitive.name.removesuffix("_start")
        within = replace(self, path=path_of(eqn, self.path))
        if rule := _STRUCTURED.get(name):
            return rule(within, eqn, inputs)
        if inner := sub_jaxprs(eqn):
            return within._call(eqn, inner, inputs)
        if axes := axes_of(eqn.params):
            return [self._collective(eqn, name, axes, max(inputs, default=_Along.SAME))] * len(
                eqn.outvars
            )
        return [max(inputs, default=_Along.SAME)] * len(eqn.outvars)

    def _collective(self, eqn: Any, name: str, axes: tuple[str, ...], value: _Along) -> _Along:
        if name in _KEEP or self.axis not in axes:
            return value
        if eqn.params.get("axis_index_groups") is not None:
            return _Along.DIFFERS
        is_wrong = value is _Along.GATHERED and not self._is_mean(eqn, axes)
        if name in _REDUCTIONS and is_wrong and not made_by_autodiff(path_of(eqn, self.path)):
            place = source.shorten(_compat.eqn_frames(eqn))
            self.findings[id(eqn)] = Finding(_compat.eqn_tag(eqn), self.axis, name, place)
        if name in _GATHERS:
            return _Along.GATHERED
        return _Along.SAME if name in _SAME_AFTER else _Along.DIFFERS

    def _is_mean(self, eqn: Any, axes: tuple[str, ...]) -> bool:
        if (_compat.eqn_tag(eqn) or "").startswith("pmean/"):
            return True
        count = math.prod(self.sizes.get(axis, 1) for axis in axes)
        return all(self.divisors.get(out) == count for out in eqn.outvars)  # jax.lax.pmean

    def _call(self, eqn: Any, inner: list[Any], inputs: list[_Along]) -> list[_Along]:
        """Go through a call with one body of the same arguments (jit, remat, custom_vjp...)."""
        body = inner[0]
        fits = len(body.invars) == len(inputs) and len(body.outvars) == len(eqn.outvars)
        if len(inner) == 1 and fits:
            return self.run(body, inputs)
        return [_Along.DIFFERS] * len(eqn.outvars)

    def scan(self, eqn: Any, inputs: list[_Along]) -> list[_Along]:
        """Repeat a scan's body until its carry settles."""
        consts, carries = _compat.scan_counts(eqn)
        body = eqn.params["jaxpr"].jaxpr
        fixed, rest = inputs[:consts], inputs[consts:]
        carry, xs = rest[:carries], rest[carries:]
        settled = self._settle(lambda c: self.run(body, [*fixed, *c, *xs])[:carries], carry)
        return [*settled, *self.run(body, [*fixed, *settled, *xs])[carries:]]

    def while_loop(self, eqn: Any, inputs: list[_Along]) -> list[_Along]:
        """Repeat a while loop's body until its carry settles."""
        of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        body, cond = eqn.params["body_jaxpr"].jaxpr, eqn.params["cond_jaxpr"].jaxpr
        fixed, carry = inputs[of_cond : of_cond + of_body], inputs[of_cond + of_body :]
        settled = self._settle(lambda c: self.run(body, [*fixed, *c]), carry)
        runs_alike = self.run(cond, [*inputs[:of_cond], *settled])[0] is not _Along.DIFFERS
        return settled if runs_alike else [_Along.DIFFERS] * len(settled)

    def cond(self, eqn: Any, inputs: list[_Along]) -> list[_Along]:
        """Join the branches; where the predicate differs, so does every output."""
        outputs = [self.run(branch.jaxpr, inputs[1:]) for branch in eqn.params["branches"]]
        if inputs[0] is _Along.DIFFERS:
            return [_Along.DIFFERS] * len(eqn.outvars)
        return [max(values) for values in zip(*outputs, strict=True)]

    def _settle(
        self, step: Callable[[list[_Along]], list[_Along]], carry: list[_Along]
    ) -> list[_Along]:
        before = dict(self.findings)
        while True:
            after = [max(a, b) for a, b in zip(carry, step(carry), strict=True)]
            if after == carry:
                return carry
            # Found with a carry that only the first trip has: it may come to differ later.
            self.findings.clear()
            self.findings.update(before)
            carry = after


def _divisors(jaxpr: Any) -> dict[Any, float]:
    variables = [v for eqn in jaxpr.eqns for v in eqn.invars] + list(jaxpr.outvars)
    uses = Counter(v for v in variables if not is_literal(v))
    divided = (eqn.invars for eqn in jaxpr.eqns if eqn.primitive.name == "div")
    return {
        value: float(by.val)
        for value, by in divided
        if is_literal(by) and not is_literal(value) and uses[value] == 1
    }


def _differs(walk: _Walk, eqn: Any, inputs: list[_Along]) -> list[_Along]:
    return [_Along.DIFFERS] * len(eqn.outvars)


_STRUCTURED: dict[str, Callable[[_Walk, Any, list[_Along]], list[_Along]]] = {
    "scan": _Walk.scan,
    "while": _Walk.while_loop,
    "cond": _Walk.cond,
    "shard_map": _differs,
    "pallas_call": _differs,
    "ffi_call": _differs,
    "pure_callback": _differs,
    "io_callback": _differs,
}
