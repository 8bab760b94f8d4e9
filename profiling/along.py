"""Follow each value of a shard_map along one mesh axis: is it the same on all its devices?

jax's types answer that only where it tracks them, and roughly: what was gathered, or cast to
varying, is typed as varying though it is equal. The walk follows the data itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, TypeVar

from txcore import _compat
from txcore.profiling import meshes
from txcore.profiling.jaxpr import axes_of, path_of, sub_jaxprs
from txcore.profiling.values import is_literal

GATHERS = ("all_gather", "all_gather_invariant", "all_gather_reduced")
BRANCHING = ("cond", "while")
_UNREDUCED = ("unreduced_psum", "unreduced_pmax", "unreduced_pmin")
_SAME_AFTER = ("psum", "psum_invariant", "pmax", "pmin", "pbroadcast", *_UNREDUCED)
_KEEP = ("pvary", "pcast", "preduced", "reduced_vary_cast", "vary_unreduced_cast")
_REFS = ("get", "swap")
_KERNELS = ("pallas_call", "core_map", "mpmd_map", "ffi_call")
_OPAQUE = (*_KERNELS, "pure_callback", "io_callback", *_REFS)


class Along(IntEnum):
    """How a value relates to one axis; the larger wins where values meet."""

    SAME = 0  # equal on all devices along it
    GATHERED = 1  # equal too, and made from an all_gather along it
    DIFFERS = 2  # not known to be equal


@dataclass(frozen=True)
class Place:
    """Where a walk is.

    axis: the mesh axis that it follows; sizes: all of the mesh's, with their sizes.
    tracked: whether jax's types say along which axes values vary here.
    path: the jax transformations around.
    under: the innermost cond or while around whose predicate differs along the axis, or None.
    """

    axis: str
    sizes: dict[str, int]
    tracked: bool
    path: str = ""
    under: Any = None


@dataclass(frozen=True)
class Seen:
    """An equation as a walk comes upon it.

    eqn, jaxpr: the equation, and the jaxpr that it stands in; name: its primitive's.
    axes: the mesh axes that it names, as a collective does.
    inputs, outputs: how its values relate to the walk's axis.
    splits: it is a cond or while whose predicate differs along that axis.
    """

    eqn: Any
    jaxpr: Any
    name: str
    axes: tuple[str, ...]
    inputs: Sequence[Along]
    outputs: Sequence[Along]
    splits: bool
    place: Place


Look = Callable[[Seen], Any]
Found = TypeVar("Found")


def search(
    jaxpr: Any, look: Callable[[Seen], Found | None], *, only_with: Sequence[str]
) -> list[Found]:
    """Show what matters inside shard_maps to `look`, for each axis of more than one device.

    That is each equation that names mesh axes (collectives do) or holds others (cond, while...).

    Args:
      jaxpr: a Jaxpr or ClosedJaxpr.
      look: returns what it finds in an equation, or None. An equation of a loop may be shown
        several times; what is found the last time counts.
      only_with: a program without any of these primitives has nothing to find: most have none,
        and following every value takes a while.

    Returns:
      What was found, each once.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    if not _has(jaxpr, only_with):
        return []
    return list(dict.fromkeys(_search(jaxpr, "", look)))


def _has(jaxpr: Any, names: Sequence[str]) -> bool:
    return any(
        eqn.primitive.name.removesuffix("_start") in names
        or any(_has(inner, names) for inner in sub_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


def _search(jaxpr: Any, path: str, look: Look) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        inner_path = path_of(eqn, path)
        for inner in sub_jaxprs(eqn):
            if eqn.primitive.name == "shard_map":
                yield from _in_shard_map(eqn, inner, inner_path, look)
            yield from _search(inner, inner_path, look)


def _in_shard_map(eqn: Any, body: Any, path: str, look: Look) -> Iterator[Any]:
    sizes = dict(meshes.sizes_of(eqn.params["mesh"]))
    for axis, size in sizes.items():
        # Axes of a shard_map around this one have been walked from there.
        if size > 1 and axis in eqn.params["newly_manual_axes"]:
            walk = _Walk(Place(axis, sizes, _is_tracked(eqn), path), look, {})
            # An argument whose spec does not name the axis is the same along it.
            walk.run(body, [_of_spec(spec, axis) for spec in eqn.params["in_specs"]])
            yield from walk.findings.values()


def _of_spec(spec: Any, axis: str) -> Along:
    names = [n for part in spec for n in (part if isinstance(part, tuple) else (part,))]
    return Along.DIFFERS if axis in names else Along.SAME


def _is_tracked(shard_map: Any) -> bool:
    return bool(shard_map.params.get("check_vma", False))


@dataclass(frozen=True)
class _Walk:
    """A forward walk; `findings` by the id of the equation in which something was found."""

    place: Place
    look: Look
    findings: dict[int, Any]

    def enter(self, **changes: Any) -> "_Walk":
        """Return the walk of what an equation holds, which changes the place so."""
        return replace(self, place=replace(self.place, **changes))

    def run(self, jaxpr: Any, inputs: Sequence[Along]) -> list[Along]:
        """Return how a jaxpr's outputs relate to the axis, from how its inputs do."""
        known: dict[Any, Along] = dict.fromkeys(jaxpr.constvars, Along.SAME)
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def read(var: Any) -> Along:
            return Along.SAME if is_literal(var) else known.get(var, Along.DIFFERS)

        for eqn in jaxpr.eqns:
            outputs = self._eqn(eqn, jaxpr, [read(v) for v in eqn.invars])
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _eqn(self, eqn: Any, jaxpr: Any, inputs: list[Along]) -> list[Along]:
        name = eqn.primitive.name.removesuffix("_start")
        axes, inner = axes_of(eqn.params), sub_jaxprs(eqn)
        if name in _OPAQUE:
            return self._opaque(eqn, inputs)
        if not axes and not inner:
            return [max(inputs, default=Along.SAME)] * len(eqn.outvars)
        within = self.enter(path=path_of(eqn, self.place.path))
        splits = False
        if name in BRANCHING:
            outputs, splits = _branching(within, eqn, inputs)
        elif name == "scan":
            outputs = _scan(within, eqn, inputs)
        elif name == "shard_map":
            outputs = within.enter(tracked=_is_tracked(eqn)).call(eqn, inner, inputs)
        elif inner:
            outputs = within.call(eqn, inner, inputs)
        else:
            value = self._after(eqn, name, axes, max(inputs, default=Along.SAME))
            outputs = [value] * len(eqn.outvars)
        seen = Seen(eqn, jaxpr, name, axes, inputs, outputs, splits, within.place)
        if (found := self.look(seen)) is not None:
            self.findings[id(eqn)] = found
        return outputs

    def _after(self, eqn: Any, name: str, axes: tuple[str, ...], value: Along) -> Along:
        if name in _KEEP or self.place.axis not in axes:
            return value
        if eqn.params.get("axis_index_groups") is not None:
            return Along.DIFFERS
        if name in GATHERS:
            return Along.GATHERED
        return Along.SAME if name in _SAME_AFTER else Along.DIFFERS

    def _opaque(self, eqn: Any, inputs: list[Along]) -> list[Along]:
        """Believe the types of what is not followed; without them it follows from what goes in.

        Not so what a mutable array holds: anything may have been written to it before.
        """
        if eqn.primitive.name == "io_callback":  # each process's own
            return [Along.DIFFERS] * len(eqn.outvars)
        if self.place.tracked:
            typed = [self.place.axis in _compat.varying_axes_of(v.aval) for v in eqn.outvars]
            return [Along.DIFFERS if varies else Along.SAME for varies in typed]
        is_same = not any(inputs) and eqn.primitive.name not in _REFS
        value = Along.SAME if is_same else Along.DIFFERS
        return [value] * len(eqn.outvars)

    def call(self, eqn: Any, inner: list[Any], inputs: list[Along]) -> list[Along]:
        """Go through a call with one body of the same arguments (jit, remat, custom_vjp...)."""
        body = inner[0]
        fits = len(body.invars) == len(inputs) and len(body.outvars) == len(eqn.outvars)
        if len(inner) == 1 and fits:
            return self.run(body, inputs)
        # A scatter's combiner, a linear solve's functions: what reaches them is not known here.
        value = max(inputs, default=Along.SAME)
        results = [self.run(body, [value] * len(body.invars)) for body in inner]
        return [max([value, *(r for result in results for r in result)])] * len(eqn.outvars)

    def settle(self, step: Callable[[list[Along]], list[Along]], carry: list[Along]) -> list[Along]:
        """Repeat a loop's body, whose first outputs are its carry, until those settle."""
        before = dict(self.findings)
        while True:
            outputs = step(carry)
            after = [max(a, b) for a, b in zip(carry, outputs, strict=False)]
            if after == carry:
                return [*carry, *outputs[len(carry) :]]
            # Found with a carry that only the first trip has: it may come to differ later.
            self.findings.clear()
            self.findings.update(before)
            carry = after


def _scan(walk: _Walk, eqn: Any, inputs: list[Along]) -> list[Along]:
    consts, carries = _compat.scan_counts(eqn)
    body = eqn.params["jaxpr"].jaxpr
    fixed, carry = inputs[:consts], inputs[consts : consts + carries]
    scanned = inputs[consts + carries :]
    return walk.settle(lambda c: walk.run(body, [*fixed, *c, *scanned]), carry)


def _branching(walk: _Walk, eqn: Any, inputs: list[Along]) -> tuple[list[Along], bool]:
    """Return a cond's or while's outputs, and whether its predicate differs.

    Where it does every output differs too, but those that each way through hands on unchanged.
    """
    if eqn.primitive.name == "cond":
        outputs, splits = _cond(walk, eqn, inputs)
        handed_on = _chosen_alike(eqn)
    else:
        outputs, splits = _while(walk, eqn, inputs)
        handed_on = _carried_along(eqn)
    if splits:
        pairs = zip(outputs, handed_on, strict=True)
        outputs = [value if same else Along.DIFFERS for value, same in pairs]
    return outputs, splits


def _cond(walk: _Walk, eqn: Any, inputs: list[Along]) -> tuple[list[Along], bool]:
    splits = inputs[0] is Along.DIFFERS
    inside = walk.enter(under=eqn) if splits else walk
    results = [inside.run(branch.jaxpr, inputs[1:]) for branch in eqn.params["branches"]]
    return [max(values) for values in zip(*results, strict=True)], splits


def _while(walk: _Walk, eqn: Any, inputs: list[Along]) -> tuple[list[Along], bool]:
    of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    body, cond = eqn.params["body_jaxpr"].jaxpr, eqn.params["cond_jaxpr"].jaxpr
    fixed, carry = inputs[of_cond : of_cond + of_body], inputs[of_cond + of_body :]
    settled = walk.settle(lambda c: walk.run(body, [*fixed, *c]), carry)
    test = [*inputs[:of_cond], *settled]
    splits = walk.run(cond, test)[0] is Along.DIFFERS
    if splits:  # known only now: what is inside has to be shown again, as standing under it
        inside = walk.enter(under=eqn)
        inside.run(cond, test)
        inside.run(body, [*fixed, *settled])
    return settled, splits


def _chosen_alike(cond: Any) -> list[bool]:
    """Tell of each output of a cond whether all branches return the same operand or constant."""

    def chosen(branch: Any, var: Any) -> object:
        if is_literal(var):
            return str(var.val)
        return branch.invars.index(var) if var in branch.invars else object()

    branches = [branch.jaxpr for branch in cond.params["branches"]]
    choices = [[chosen(b, var) for var in b.outvars] for b in branches]
    return [len(set(of_output)) == 1 for of_output in zip(*choices, strict=True)]


def _carried_along(loop: Any) -> list[bool]:
    body = loop.params["body_jaxpr"].jaxpr
    carries = body.invars[loop.params["body_nconsts"] :]
    return [before is after for before, after in zip(carries, body.outvars, strict=True)]
