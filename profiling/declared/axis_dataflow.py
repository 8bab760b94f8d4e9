"""Follow each value of a shard_map along one mesh axis: is it the same on all its devices?

jax's types answer that only where it tracks them, and roughly: what was gathered, or cast to
varying, is typed as varying though it is equal; what argsort or a callback makes of local data is
typed as equal though it differs. The walk follows the data itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax.numpy as jnp

from txcore import _compat, tags, varying
from txcore.profiling import meshes
from txcore.profiling.declared import relation
from txcore.profiling.declared.collectives import (
    axes_of,
    has_any,
    made_by_autodiff,
    path_of,
    sub_jaxprs,
)
from txcore.profiling.declared.relation import (
    DEPENDS,
    DIFFERS,
    SLICED,
    UNKNOWN,
    Relation,
    may_differ,
)
from txcore.profiling.declared.value_numbering import is_literal

BRANCHING = ("cond", "while")
SUMS = ("psum", "psum_invariant", "reduce_scatter")
_GATHERS = ("all_gather", "all_gather_invariant", "all_gather_reduced")
_EQUAL_AFTER = (
    *("psum", "psum_invariant", "pmax", "pmin", "pbroadcast"),
    *("unreduced_psum", "unreduced_pmax", "unreduced_pmin"),
)
_CASTS = ("pvary", "pcast")
_KEEP = (*_CASTS, "preduced", "reduced_vary_cast", "vary_unreduced_cast", "vary_unreduced_cast_p")
_REFS = ("get", "swap")
_KERNELS = ("pallas_call", "core_map", "mpmd_map", "ffi_call")
# Most equations: they name no mesh axis and hold no jaxpr, so that nobody has to look.
_PLAIN = frozenset(
    ("add", "sub", "mul", "div", "neg", "max", "min", "exp", "log", "tanh", "logistic", "erf")
    + ("integer_pow", "pow", "sqrt", "rsqrt", "square", "sign", "abs", "sin", "cos", "add_any")
    + ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "select_n", "stop_gradient")
    + ("dot_general", "conv_general_dilated", "broadcast_in_dim", "reshape", "transpose")
    + ("convert_element_type", "squeeze", "slice", "pad", "concatenate", "iota", "copy")
    + ("dynamic_slice", "dynamic_update_slice", "gather", "reduce_sum", "reduce_max", "rev")
)


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
    inputs: Sequence[Relation]
    outputs: Sequence[Relation]
    splits: bool
    place: Place

    @property
    def tag(self) -> str | None:
        """The tag of the call of txcore that made it."""
        return tags.tag_in(self.place.path)

    @property
    def by_autodiff(self) -> bool:
        """Whether it is the transpose of a cast or of a gather, and nobody's own reduction."""
        return _sums_cotangents(self.name, self.tag, self.place.path)


Look = Callable[[Seen], Any]
Found = TypeVar("Found")


def search(
    jaxpr: Any,
    look: Callable[[Seen], Found | None],
    *,
    only_with: Sequence[str] | None = None,
    every: bool = False,
) -> list[Found]:
    """Show what matters inside shard_maps to `look`, for each axis of more than one device.

    That is each equation that names mesh axes (collectives do), holds others (cond, while...) or
    claims something of a value (`varying.claim`).

    Args:
      jaxpr: a Jaxpr or ClosedJaxpr.
      look: returns what it finds in an equation, or None. An equation of a loop may be shown
        several times; what is found the last time counts.
      only_with: a program without any of these primitives has nothing to find: most have none,
        and following every value takes a while. None if any program may.
      every: show all equations.

    Returns:
      What was found, each once, in the order of the equations.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    if only_with is not None and not has_any(jaxpr, only_with):
        return []
    return list(dict.fromkeys(_search(jaxpr, "", look, every)))


def _search(jaxpr: Any, path: str, look: Look, every: bool) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _PLAIN:
            continue
        inner_path = path_of(eqn, path)
        for inner in sub_jaxprs(eqn):
            if eqn.primitive.name == "shard_map":
                yield from _in_shard_map(eqn, inner, inner_path, look, every)
            yield from _search(inner, inner_path, look, every)


def _in_shard_map(eqn: Any, body: Any, path: str, look: Look, every: bool) -> Iterator[Any]:
    sizes = dict(meshes.sizes_of(eqn.params["mesh"]))
    for axis, size in sizes.items():
        # Axes of a shard_map around this one have been walked from there.
        if size > 1 and axis in eqn.params["newly_manual_axes"]:
            walk = _Walk(Place(axis, sizes, _is_tracked(eqn), path), look, every)
            # An argument whose spec does not name the axis is the same along it.
            walk.run(body, [_of_spec(spec, axis) for spec in eqn.params["in_specs"]])
            yield from walk.findings.values()


def _of_spec(spec: Any, axis: str) -> Relation:
    names = [n for part in spec for n in (part if isinstance(part, tuple) else (part,))]
    return DEPENDS | DIFFERS if axis in names else DEPENDS


def _is_tracked(shard_map: Any) -> bool:
    return bool(shard_map.params.get("check_vma", False))


def _sums_cotangents(name: str, tag: str | None, path: str) -> bool:
    """Tell whether a reduction is the transpose of a cast or of a gather.

    One that is written in the backward function of a custom derivative has another tag.
    """
    if name not in SUMS or not made_by_autodiff(path):
        return False
    return tag is None or tag.split("/")[0] in ("vary", "all_gather")


@dataclass(frozen=True)
class _Walk:
    """A forward walk; `findings` by the id of the equation in which something was found."""

    place: Place
    look: Look
    every: bool = False
    findings: dict[int, Any] = field(default_factory=dict)

    def enter(self, **changes: Any) -> "_Walk":
        """Return the walk of what an equation holds, which changes the place so."""
        return replace(self, place=replace(self.place, **changes))

    def run(self, jaxpr: Any, inputs: Sequence[Relation]) -> list[Relation]:
        """Return how a jaxpr's outputs relate to the axis, from how its inputs do."""
        known: dict[Any, Relation] = dict.fromkeys(jaxpr.constvars, relation.CONSTANT)
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def read(var: Any) -> Relation:
            return relation.of_literal(var.val) if is_literal(var) else known.get(var, UNKNOWN)

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            name = eqn.primitive.name
            if name in _PLAIN:
                outputs = [self._plain(eqn, name, values)]
                if self.every:
                    self._show(Seen(eqn, jaxpr, name, (), values, outputs, False, self.place))
            else:
                outputs = self._eqn(eqn, jaxpr, values)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _plain(self, eqn: Any, name: str, inputs: list[Relation]) -> Relation:
        value = relation.after(name, inputs)
        used = relation.after_use(name, inputs, value)
        # Most are the same either way, and a path takes a while to write.
        by_autodiff = used != value and made_by_autodiff(path_of(eqn, self.place.path))
        return value if by_autodiff else used

    def _eqn(self, eqn: Any, jaxpr: Any, inputs: list[Relation]) -> list[Relation]:
        name = eqn.primitive.name.removesuffix("_start")
        axes, inner = axes_of(eqn.params), sub_jaxprs(eqn)
        within, splits = self, False
        if name == varying.CLAIM:
            outputs = inputs
        elif name in _KERNELS or name in _REFS or name == "io_callback":
            outputs = self._opaque(eqn, name, inputs)
        elif not axes and not inner:
            outputs = [self._plain(eqn, name, inputs)] * len(eqn.outvars)
        else:
            within = self.enter(path=path_of(eqn, self.place.path))
            if name in BRANCHING:
                outputs, splits = _branching(within, eqn, inputs)
            elif name == "scan":
                outputs = _scan(within, eqn, inputs)
            elif name == "shard_map":
                outputs = within.enter(tracked=_is_tracked(eqn)).call(eqn, inner, inputs)
            elif inner:
                outputs = within.call(eqn, inner, inputs)
            else:
                outputs = within._collective(eqn, jaxpr, name, axes, inputs)
        if self.every or within is not self or name == varying.CLAIM:
            self._show(Seen(eqn, jaxpr, name, axes, inputs, outputs, splits, within.place))
        return outputs

    def _show(self, seen: Seen) -> None:
        if (found := self.look(seen)) is not None:
            self.findings[id(seen.eqn)] = found

    def _collective(
        self, eqn: Any, jaxpr: Any, name: str, axes: tuple[str, ...], inputs: list[Relation]
    ) -> list[Relation]:
        if name == "axis_index":
            return [DIFFERS if self.place.axis in axes else relation.CONSTANT]
        joined = relation.after(name, inputs)
        # A psum of a tree is one equation with as many outputs as inputs.
        each = inputs if len(inputs) == len(eqn.outvars) else [joined] * len(eqn.outvars)
        if self.place.axis not in axes:
            return list(each)
        if name in _KEEP:
            return [self._cast(eqn, name, value) for value in each]
        if eqn.params.get("axis_index_groups") is not None:
            return [relation.after_exchange(value) for value in each]
        if _sums_cotangents(name, tags.tag_in(self.place.path), self.place.path):
            scatters = name == "reduce_scatter"
            return [
                relation.after_sum_of_cotangents(
                    value, divided=is_divided(jaxpr, var, axes, self.place), scatters=scatters
                )
                for value, var in zip(each, eqn.outvars, strict=True)
            ]
        if name in _GATHERS:
            return [relation.after_gather(value) for value in each]
        if name in _EQUAL_AFTER:
            return [relation.after_sum(value) for value in each]
        if name == "reduce_scatter":
            return [relation.after_sum(value) | DIFFERS for value in each]
        return [relation.after_exchange(value) for value in each]

    def _cast(self, eqn: Any, name: str, value: Relation) -> Relation:
        if name not in _CASTS:
            return value
        if made_by_autodiff(self.place.path):
            if relation.is_zero(value) or not jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact):
                return value
            return relation.after_crossing(value, _compat.eqn_collective(eqn))
        tag = tags.tag_in(self.place.path) or ""
        asked = tag.split("/")[0] == "vary" and not tag.startswith("vary/params")
        return value | relation.ASKED if asked else value

    def _opaque(self, eqn: Any, name: str, inputs: list[Relation]) -> list[Relation]:
        """Follow what is not looked into: its results differ where its inputs do.

        A kernel may ask which device it runs on, and what a mutable array holds may have been
        written to it before: there jax's types decide, where it tracks them.
        """
        value = relation.after(name, inputs)
        if name == "io_callback":  # each process has its own
            return [value | UNKNOWN] * len(eqn.outvars)
        if not self.place.tracked:
            return [value | UNKNOWN] * len(eqn.outvars)
        axis = self.place.axis
        local = any(axis in _compat.varying_axes_of(v.aval) for v in eqn.invars)
        return [
            self._typed(value, name, axis in _compat.varying_axes_of(var.aval), local)
            for var in eqn.outvars
        ]

    def _typed(self, value: Relation, name: str, varies: bool, local: bool) -> Relation:
        if varies:
            return value | UNKNOWN
        # A kernel's result is typed by hand: it says that the kernel made it equal.
        declared = name in _REFS or (name != "ffi_call" and local)
        return relation.after_sum(value) if declared else value

    def call(self, eqn: Any, inner: list[Any], inputs: list[Relation]) -> list[Relation]:
        """Go through a call with one body of the same arguments (jit, remat, custom_vjp...)."""
        body = inner[0]
        fits = len(body.invars) == len(inputs) and len(body.outvars) == len(eqn.outvars)
        if len(inner) == 1 and fits:
            return self.run(body, inputs)
        # A scatter's combiner, a linear solve's functions: what reaches them is not known here.
        value = relation.after(eqn.primitive.name, inputs)
        results = [self.run(body, [value] * len(body.invars)) for body in inner]
        for result in results:
            for one in result:
                value |= one
        return [value] * len(eqn.outvars)

    def settle(
        self, step: Callable[[list[Relation]], list[Relation]], carry: list[Relation]
    ) -> list[Relation]:
        """Repeat a loop's body, whose first outputs are its carry, until those settle."""
        before, carry = dict(self.findings), [value | SLICED for value in carry]
        while True:
            outputs = step(carry)
            after = [a | b for a, b in zip(carry, outputs, strict=False)]
            if after == carry:
                return [*carry, *outputs[len(carry) :]]
            # Found with a carry that only the first trip has: it may come to differ later.
            self.findings.clear()
            self.findings.update(before)
            carry = after


def is_divided(jaxpr: Any, var: Any, axes: tuple[str, ...], place: Place) -> bool:
    """Tell whether a sum is only ever divided by the number of devices along its axes."""
    count = 1
    for axis in axes:
        count *= place.sizes.get(axis, 1)
    uses = [eqn for eqn in jaxpr.eqns if any(v is var for v in eqn.invars)]
    if len(uses) != 1 or any(v is var for v in jaxpr.outvars):
        return False
    (use,) = uses
    if use.primitive.name in ("convert_element_type", "reshape", "neg"):
        return is_divided(jaxpr, use.outvars[0], axes, place)
    numbers = [float(v.val) for v in use.invars if is_literal(v) and v.aval.size == 1]
    if use.primitive.name == "div" and use.invars[0] is var:
        return any(n in (count, place.sizes[place.axis]) for n in numbers)
    return use.primitive.name == "mul" and any(abs(n * count - 1) < 1e-6 for n in numbers)


def _scan(walk: _Walk, eqn: Any, inputs: list[Relation]) -> list[Relation]:
    consts, carries = _compat.scan_counts(eqn)
    body = eqn.params["jaxpr"].jaxpr
    fixed, carry = inputs[:consts], inputs[consts : consts + carries]
    scanned = [value | SLICED for value in inputs[consts + carries :]]
    outputs = walk.settle(lambda c: walk.run(body, [*fixed, *c, *scanned]), carry)
    return _out_of_loop(outputs, inputs)


def _out_of_loop(outputs: list[Relation], inputs: list[Relation]) -> list[Relation]:
    sliced = 0
    for value in inputs:
        sliced |= value & SLICED
    return [value & ~SLICED | sliced for value in outputs]


def _branching(walk: _Walk, eqn: Any, inputs: list[Relation]) -> tuple[list[Relation], bool]:
    """Return a cond's or while's outputs, and whether its predicate differs.

    Where it does every output differs too, but those that each way through hands on unchanged.
    """
    if eqn.primitive.name == "cond":
        outputs, test = _cond(walk, eqn, inputs)
        handed_on = _chosen_alike(eqn)
    else:
        outputs, test = _while(walk, eqn, inputs)
        handed_on = _carried_along(eqn)
    chosen = test & (relation.CONSTANT | DEPENDS | DIFFERS | UNKNOWN | SLICED)
    pairs = zip(outputs, handed_on, strict=True)
    return [v if same else v | chosen for v, same in pairs], may_differ(test)


def _cond(walk: _Walk, eqn: Any, inputs: list[Relation]) -> tuple[list[Relation], Relation]:
    inside = walk.enter(under=eqn) if may_differ(inputs[0]) else walk
    results = [inside.run(branch.jaxpr, inputs[1:]) for branch in eqn.params["branches"]]
    outputs = list(results[0])
    for result in results[1:]:
        outputs = [a | b for a, b in zip(outputs, result, strict=True)]
    return outputs, inputs[0]


def _while(walk: _Walk, eqn: Any, inputs: list[Relation]) -> tuple[list[Relation], Relation]:
    of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    body, cond = eqn.params["body_jaxpr"].jaxpr, eqn.params["cond_jaxpr"].jaxpr
    fixed, carry = inputs[of_cond : of_cond + of_body], inputs[of_cond + of_body :]
    settled = walk.settle(lambda c: walk.run(body, [*fixed, *c]), carry)
    test = [*inputs[:of_cond], *settled]
    (predicate,) = walk.run(cond, test)
    if may_differ(predicate):  # known only now: what is inside has to be shown again, under it
        inside = walk.enter(under=eqn)
        inside.run(cond, test)
        inside.run(body, [*fixed, *settled])
    return _out_of_loop(settled, inputs), predicate


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
