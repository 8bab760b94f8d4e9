"""Follow each value of a shard_map along one mesh axis: is it the same on all its devices?

jax's types answer that only where it tracks them, and roughly: they call a gathered value, or one
cast to varying, varying though it is equal, and the result of argsort or a callback on local data
equal though it differs. The walk follows the data itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp

from txcore import _compat, tags, varying
from txcore.profiling import meshes
from txcore.profiling.declared import relation
from txcore.profiling.declared.equations import (
    ALL_REDUCED_SUMS,
    CASTS,
    EQUALIZERS,
    GATHERS,
    KERNELS,
    OPAQUE,
    PLAIN,
    REFS,
    VARYING_CASTS,
    Eqn,
    Jaxpr,
    Var,
    axes_of,
    axes_of_spec,
    has_any,
    made_by_autodiff,
    name_of,
    open_jaxpr,
    path_of,
)
from txcore.profiling.declared.forward import Forward, Frame, find_shard_maps
from txcore.profiling.declared.relation import DEPENDS, DIFFERS, UNKNOWN, Relation, may_differ
from txcore.profiling.declared.seen import Seen, counts_of, is_divided, sums_cotangents

# The number of a loop's trips that are followed one by one, for facts that only later trips have.
_FOLLOWED_TRIPS = 8


Look = Callable[[Seen], Any]
Found = TypeVar("Found")


def search_equations(
    jaxpr: Jaxpr,
    look: Callable[[Seen], Found | None],
    *,
    only_with: Sequence[str] | None = None,
    every: bool = False,
) -> list[Found]:
    """Collect what `look` finds inside shard_maps, for each axis of more than one device.

    It sees each equation that names mesh axes (collectives do), holds other equations (cond,
    while...) or claims something about a value (`varying.claim`).

    Args:
      jaxpr: a Jaxpr or ClosedJaxpr.
      look: returns its finding in an equation, or None. It may see an equation of a loop several
        times; the last finding counts.
      only_with: the primitives without which a program has nothing to find. Most programs have
        none of them, and following every value takes a while. None searches every program.
      every: show all equations.

    Returns:
      The findings, each once, in the order of the equations.
    """
    jaxpr = open_jaxpr(jaxpr)
    found: list[Found] = []
    if only_with is not None and not has_any(jaxpr, only_with):
        return []
    for eqn, frame in find_shard_maps(jaxpr):
        sizes, body = dict(meshes.sizes_of(eqn.params["mesh"])), open_jaxpr(eqn.params["jaxpr"])
        for axis, size in sizes.items():
            # Axes of a shard_map around this one have been walked from there.
            if size > 1 and axis in eqn.params["newly_manual_axes"]:
                walk = Uniformity(axis, sizes, look, every=every)
                walk.run_jaxpr(
                    body, [_relation_of_spec(spec, axis) for spec in eqn.params["in_specs"]], frame
                )
                found += walk.findings.values()
    return list(dict.fromkeys(found))


def _relation_of_spec(spec: Any, axis: str) -> Relation:
    # An argument whose spec does not name the axis is the same along it.
    return DEPENDS | DIFFERS if axis in axes_of_spec(spec) else DEPENDS


class Uniformity(Forward[Relation]):
    """The relation of each value to one mesh axis; `findings` are keyed by their equation's id."""

    def __init__(
        self, axis: str, sizes: dict[str, int], look: Look, *, every: bool = False
    ) -> None:
        """Follow `axis` of a mesh with these sizes, and show `look` equations, or `every` one."""
        self.axis, self.sizes = axis, sizes
        self.findings: dict[int, Any] = {}
        self._look, self._every = look, every

    def of_literal(self, var: Var) -> Relation:
        """Tell a zero from other constants."""
        return relation.of_literal(var.val)

    def of_constant(self) -> Relation:
        """Take an array that the program holds for nonzero."""
        return relation.CONSTANT

    def join_facts(self, a: Relation, b: Relation) -> Relation:
        """Return the relation of a value that may be either of two."""
        return relation.join_relations(a, b)

    def splits_devices(self, predicate: Relation) -> bool:
        """Tell whether a predicate may differ along the axis."""
        return may_differ(predicate)

    def choose_by(self, value: Relation, predicate: Relation) -> Relation:
        """Let a value differ where its predicate does."""
        return relation.after_choice(value, predicate)

    def enter_loop(self, fact: Relation) -> Relation:
        """Mark a loop's carry, or a slice of what it goes over, as sliced."""
        return relation.inside_loop(fact)

    def leave_equation(
        self, eqn: Eqn, outputs: list[Relation], inputs: Sequence[Relation]
    ) -> list[Relation]:
        """Drop the bits that hold only inside of a loop or call."""
        is_loop = eqn.primitive.name in ("scan", "while")
        return [relation.after_leaving(value, inputs if is_loop else None) for value in outputs]

    def mix_inputs(self, eqn: Eqn, inputs: Sequence[Relation]) -> Relation:
        """Return the relation of anything that is computed from some values."""
        return relation.after_operation(eqn.primitive.name, list(inputs))

    def see_equation(
        self,
        eqn: Eqn,
        jaxpr: Jaxpr,
        inputs: list[Relation],
        outputs: list[Relation],
        frame: Frame,
        splits: bool = False,
    ) -> None:
        """Show the equation to `look`, unless it is plain, and keep the finding."""
        name = name_of(eqn)
        is_quiet = name in PLAIN or name in OPAQUE
        may_hang = frame.under is not None and name in KERNELS
        if not self._every and is_quiet and not may_hang:
            return
        seen = Seen(eqn, jaxpr, name, self.axis, self.sizes, inputs, outputs, splits, frame)
        if (found := self._look(seen)) is not None:
            self.findings[id(eqn)] = found

    def run_loop(
        self,
        step: Callable[[list[Relation]], list[Relation]],
        carry: list[Relation],
        trips: int | None,
    ) -> list[Relation]:
        """Repeat a loop's body until its carry settles; then look at its later trips alone.

        The carry of all trips together shows what may differ in any trip. The carry of the later
        trips alone shows what is equal in each trip but the first, as a carry that every trip
        reduces.
        """
        before, start, first = dict(self.findings), carry, None
        while True:
            self._restart_findings(before)  # what only the first trip has may come to differ later
            outputs = step(carry)
            after = [self.enter_loop(value) for value in outputs[: len(carry)]]
            first = after if first is None else first
            settled = [self.join_facts(a, b) for a, b in zip(carry, after, strict=True)]
            if settled == carry:
                break
            carry = settled
        if first in (start, carry):
            return [*carry, *outputs[len(carry) :]]
        followed = self._follow_trips(step, first, trips)
        settled = carry if followed is None else followed
        return [*settled, *outputs[len(carry) :]]

    def _follow_trips(
        self,
        step: Callable[[list[Relation]], list[Relation]],
        carry: list[Relation],
        trips: int | None,
    ) -> list[Relation] | None:
        """Follow the trips after the first until two are alike, and keep that one's findings.

        Returns:
          The carry after the last trip, or None where it is not known.
        """
        together = dict(self.findings)
        for done in range(1, _FOLLOWED_TRIPS if trips is None else min(trips, _FOLLOWED_TRIPS)):
            after = [self.enter_loop(value) for value in step(carry)[: len(carry)]]
            found = {k: v for k, v in self.findings.items() if k not in together}
            if after == carry:
                return None if trips is None else carry
            self._restart_findings(together)
            carry = after
            if done + 1 == trips:
                self.findings.update(found)
                return carry
        return carry if trips == 1 else None

    def _restart_findings(self, findings: dict[int, Any]) -> None:
        self.findings.clear()
        self.findings.update(findings)

    def apply_equation(
        self, eqn: Eqn, jaxpr: Jaxpr, inputs: list[Relation], frame: Frame
    ) -> list[Relation]:
        """Return how the results of one operation relate to the axis."""
        name = name_of(eqn)
        if name == varying.CLAIM:
            return [self._after_claim(eqn.params, value) for value in inputs]
        if name in OPAQUE:
            return self._after_opaque(eqn, name, inputs, frame)
        if name in PLAIN or not (axes := axes_of(eqn.params)):
            return [self._after_plain(eqn, name, inputs, frame)] * len(eqn.outvars)
        if name == "axis_index":
            return [DIFFERS if self.axis in axes else relation.CONSTANT]
        joined = relation.after_operation(name, inputs)
        # A psum of a tree is one equation with as many outputs as inputs.
        each = inputs if len(inputs) == len(eqn.outvars) else [joined] * len(eqn.outvars)
        if self.axis not in axes:
            return list(each)
        return self._after_collective(eqn, jaxpr, name, axes, each, path_of(eqn, frame.path))

    def _after_claim(self, params: Mapping[str, Any], value: Relation) -> Relation:
        kind = params["kind"]
        if self.axis not in params["mesh_axes"]:
            return value
        if kind == varying.SUM:
            return relation.after_all_reduced_sum(value)
        if kind == varying.GATHERED:
            return relation.after_gather(value)
        if kind not in (varying.MEAN, varying.MEAN_SHARD):
            return value
        return relation.after_sum(value) | (DIFFERS if kind == varying.MEAN_SHARD else 0)

    def _after_plain(self, eqn: Eqn, name: str, inputs: list[Relation], frame: Frame) -> Relation:
        value = relation.after_operation(name, inputs)
        if value & relation.HOLDS_SUM and not _keeps_term(eqn, name, inputs):
            value &= ~relation.HOLDS_SUM
        used = relation.after_use(name, inputs, value)
        # Most are the same either way, and a path takes a while to write.
        by_autodiff = used != value and made_by_autodiff(path_of(eqn, frame.path))
        return value if by_autodiff else used

    def _after_collective(
        self,
        eqn: Eqn,
        jaxpr: Jaxpr,
        name: str,
        axes: tuple[str, ...],
        each: Sequence[Relation],
        path: str,
    ) -> list[Relation]:
        if name in CASTS:
            return [self._after_cast(eqn, name, value, path) for value in each]
        if eqn.params.get("axis_index_groups") is not None:
            return [relation.after_exchange(value) for value in each]
        if sums_cotangents(name, path):
            counts = counts_of(axes, self.axis, self.sizes)
            return [
                relation.after_sum_of_cotangents(
                    value,
                    divided=is_divided(jaxpr, var, counts),
                    scatters=name == "reduce_scatter",
                )
                for value, var in zip(each, eqn.outvars, strict=True)
            ]
        if name in GATHERS and made_by_autodiff(path):
            return [relation.after_gather_of_cotangents(value) for value in each]
        if name in GATHERS:
            return [relation.after_gather(value) for value in each]
        if name in ALL_REDUCED_SUMS:
            return [relation.after_all_reduced_sum(value) for value in each]
        if name in EQUALIZERS:
            return [relation.after_sum(value) for value in each]
        if name == "reduce_scatter":
            return [relation.after_sum(value) | DIFFERS for value in each]
        return [relation.after_exchange(value) for value in each]

    def _after_cast(self, eqn: Eqn, name: str, value: Relation, path: str) -> Relation:
        if name not in VARYING_CASTS:
            return value
        if made_by_autodiff(path):
            if relation.is_zero(value) or not jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact):
                return value
            return relation.after_crossing(value, _compat.eqn_collective(eqn))
        tag = tags.tag_in(path) or ""
        asked = tag.split("/")[0] == "vary" and not tag.startswith("vary/params")
        return value | relation.ASKED if asked else value

    def _after_opaque(
        self, eqn: Eqn, name: str, inputs: list[Relation], frame: Frame
    ) -> list[Relation]:
        """Let the results of an opaque operation differ where its inputs do.

        A kernel may ask which device it runs on, and a mutable array may hold what was written
        before: there jax's types decide, where it tracks them.
        """
        value = relation.after_operation(name, inputs)
        # Each process has its own result of an io_callback.
        if name == "io_callback" or not frame.tracked:
            return [value | UNKNOWN] * len(eqn.outvars)
        local = any(self.axis in _compat.varying_axes_of(v.aval) for v in eqn.invars)
        return [
            self._believe_type(value, name, self.axis in _compat.varying_axes_of(var.aval), local)
            for var in eqn.outvars
        ]

    def _believe_type(self, value: Relation, name: str, varies: bool, local: bool) -> Relation:
        if varies:
            return value | UNKNOWN
        # A kernel's result is typed by hand: it says that the kernel made it equal.
        declared = name in REFS or (name != "ffi_call" and local)
        return relation.after_sum(value) if declared else value


def _keeps_term(eqn: Eqn, name: str, inputs: Sequence[Relation]) -> bool:
    """Tell whether a sum over the axis in an operand is still a term of the result.

    A sum that is broadcast over a dim may meet each example: to sum those is no mistake.
    """
    if name not in relation.TERM_KEEPING:
        return False
    size = eqn.outvars[0].aval.size
    pairs = zip(eqn.invars, inputs, strict=True)
    return all(var.aval.size == size for var, value in pairs if value & relation.HOLDS_SUM)
