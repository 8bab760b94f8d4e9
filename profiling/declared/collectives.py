"""The collectives that a traced program declares, before the compiler has seen it."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore import _compat, tags
from txcore.profiling import meshes
from txcore.profiling.declared import source
from txcore.profiling.declared.equations import (
    KIND_OF,
    Asked,
    Eqn,
    Jaxpr,
    Var,
    axes_of,
    is_literal,
    made_by_autodiff,
    manual_axes_of,
    name_of,
    open_jaxpr,
    path_of,
    read_out_sharding,
    sizes_of,
    sub_jaxprs,
)
from txcore.profiling.declared.remote_dma import REMOTE_DMA, Sent, sent_by_kernel
from txcore.profiling.declared.value_numbering import Numbering, Value
from txcore.profiling.hlo import NO_GROUPS, Groups

# An explicit reshard: XLA chooses which collectives it takes, at most one of each whole array.
RESHARD, RESHARD_OF_A_SUM = "reshard", "reshard of a sum"
# A `custom_partitioning` sends what its rule writes for the shardings that the compiler chooses.
RULE = "custom_partitioning"
CHOSEN_LATER = (RESHARD, RULE)


@dataclass(frozen=True)
class Declared:
    """One operand of one collective of a traced program.

    Attributes:
      kind: the HLO op it lowers to ("all-reduce"); "reshard", which the compiler translates;
        "custom_partitioning", whose rule may send anything; or "remote-dma", a Pallas kernel that
        sends: then S is what each device sends.
      primitive: jax's name ("psum").
      axes: mesh axes as the program names them.
      group_size: devices along them.
      dtype: jax's name ("float32").
      payload_bytes: S of one execution: the operand's bytes on one device, times n for all_gather.
      trips: executions in one call; where not `trips_known` (a while loop) at least that many.
      tag: txcore's tag, or None.
      source: "file.py:12", the innermost line outside jax and txcore.
      autodiff: made by jax's transposition, without a tag.
      elements: S in elements, as `payload_bytes`.
      trips_known: False in a while loop.
      size_known: False under a shard_map that leaves axes to the partitioner, which may shard the
        operand further: then `elements` and `payload_bytes` are upper bounds. False for a kernel
        whose branches and loops decide what it sends.
      foldable: the compiler may eliminate it (its operand does not depend on the program's
        inputs, or its group is one device).
      live: something uses its result.
      kernel: the name of a Pallas kernel.
      simulated: a Pallas kernel that is interpreted: the compiled program has callbacks for it.
      asked_by: the primitive whose `out_sharding=` asks for it; "" of a reshard by itself.
      operand: the number of its operand's value: equal values have equal numbers.
      groups, pairs: the devices that talk to each other, by place in the mesh.
    """

    kind: str
    primitive: str
    axes: tuple[str, ...]
    group_size: int
    dtype: str
    payload_bytes: int
    trips: int
    tag: str | None
    source: str
    autodiff: bool
    elements: int = 0
    trips_known: bool = True
    size_known: bool = True
    foldable: bool = False
    live: bool = True
    kernel: str = ""
    simulated: bool = False
    asked_by: str = ""
    operand: int = field(default=-1, repr=False, compare=False)
    groups: Groups = field(default=NO_GROUPS, repr=False)
    pairs: tuple[tuple[int, int], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class _Surroundings:
    """The surroundings of an equation.

    Attributes:
      sizes: the mesh.
      manual: the axes that shard_maps have made manual.
      trips: executions in one call of the program.
      trips_known: False in a while loop: then `trips` is a lower bound.
      foldable: the compiler may find that the equation never runs.
      path: the jax transformations that made what is around it.
      frames: (file, line) of the calls that made what is around it, innermost first.
    """

    sizes: meshes.Sizes = ()
    manual: frozenset[str] = frozenset()
    trips: int = 1
    trips_known: bool = True
    foldable: bool = False
    path: str = ""
    frames: tuple[tuple[str, int], ...] = ()

    @property
    def size_known(self) -> bool:
        return all(size == 1 or name in self.manual for name, size in self.sizes)


def list_declared(jaxpr: Jaxpr) -> tuple[Declared, ...]:
    """List the collectives of a traced program, in the order in which it traced them.

    The walk enters shard_map, jit, scan (times its length), while, every branch of cond, remat,
    custom derivatives and any other equation that holds a jaxpr.

    Args:
      jaxpr: a Jaxpr or ClosedJaxpr, as `jax.jit(f).trace(*args).jaxpr`.

    Returns:
      One `Declared` for each operand of each collective.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> spec = jax.sharding.PartitionSpec()
      >>> total = jax.shard_map(lambda x: jax.lax.psum(jax.lax.pcast(x, "data", to="varying"),
      ...     "data"), mesh=mesh, in_specs=spec, out_specs=spec)
      >>> jaxpr = jax.make_jaxpr(total)(jnp.ones(4))
      >>> [(d.kind, d.axes, d.payload_bytes) for d in list_declared(jaxpr)]
      [('all-reduce', ('data',), 16)]
    """
    jaxpr = open_jaxpr(jaxpr)
    live = _compat.live_jaxpr(jaxpr)
    if _count_declared(live) == _count_declared(jaxpr):
        return tuple(_walk_program(jaxpr))
    used = Counter(map(_key_of_declared, _walk_program(live)))
    found = []
    for declared in _walk_program(jaxpr):
        line = _key_of_declared(declared)
        found.append(declared if used[line] > 0 else replace(declared, live=False))
        used[line] -= 1
    return tuple(found)


def _count_declared(jaxpr: Jaxpr) -> int:
    """Count the equations of collectives and reshards in a jaxpr."""
    return sum(
        (
            name_of(eqn) in KIND_OF
            or eqn.primitive.name in CHOSEN_LATER
            or sent_by_kernel(eqn, ()) is not None
            or read_out_sharding(eqn) is not None
        )
        + sum(map(_count_declared, sub_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def _walk_program(jaxpr: Jaxpr) -> Iterator[Declared]:
    numbering = Numbering()
    known = {v: numbering.new_value(depends=True) for v in jaxpr.invars}
    known |= {v: numbering.new_value(depends=False) for v in jaxpr.constvars}
    return _walk_jaxpr(jaxpr, _Surroundings(), known, numbering)


def _key_of_declared(declared: Declared) -> tuple[object, ...]:
    """Return the fields by which a reader tells two declarations apart."""
    # Groups and pairs come from a cache: the same ones are the same object.
    d = declared
    who = d.kind, d.primitive, d.axes, d.tag, d.source, id(d.groups), id(d.pairs)
    return *who, d.elements, d.dtype, d.trips


def _walk_jaxpr(
    jaxpr: Jaxpr, scope: _Surroundings, known: dict[Var, Value], numbering: Numbering
) -> Iterator[Declared]:
    """Yield the collectives of a jaxpr; `known` has the values of its inputs, and gets the rest."""

    def value_of(var: Var) -> Value:
        return numbering.number_literal(var) if is_literal(var) else known[var]

    for eqn in jaxpr.eqns:
        inputs = [value_of(v) for v in eqn.invars]
        known.update(zip(eqn.outvars, numbering.number_results(eqn, inputs), strict=True))
        name = name_of(eqn)
        if kind := KIND_OF.get(name):
            yield from _declare_operands(eqn, kind, name, scope, inputs)
        elif name == RESHARD:
            yield from _declare_reshard(eqn, scope, inputs[0])
        elif name == RULE:
            yield _declare_rule(eqn, scope)
        elif sent := sent_by_kernel(eqn, scope.sizes):
            yield _declare_kernel(eqn, sent, scope, inputs)
        elif asked := read_out_sharding(eqn):
            yield from _declare_asked(eqn, asked, scope, inputs)
        for inner in sub_jaxprs(eqn):
            values = numbering.number_inputs(eqn, inner, inputs)
            yield from _walk_jaxpr(inner, _scope_inside(eqn, scope, inputs), values, numbering)


def _scope_inside(eqn: Eqn, scope: _Surroundings, inputs: Sequence[Value]) -> _Surroundings:
    name = eqn.primitive.name
    frames = (*_compat.eqn_frames(eqn), *scope.frames)
    scope = replace(scope, path=path_of(eqn, scope.path), frames=frames)
    if name == "scan":
        return replace(scope, trips=scope.trips * int(eqn.params["length"]))
    if name == "while":
        return replace(scope, trips_known=False)
    if name == "cond" and not inputs[0].depends:
        return replace(scope, foldable=True)  # the compiler knows which branch is taken
    if name == "shard_map":
        return replace(scope, sizes=sizes_of(eqn), manual=scope.manual | manual_axes_of(eqn))
    return scope


def _source_of(eqn: Eqn, scope: _Surroundings) -> str:
    """Return the user's line; what jax traces by itself (checkpoint) knows none but around it."""
    return source.user_source_line((*_compat.eqn_frames(eqn), *scope.frames))


def _declare_operands(
    eqn: Eqn, kind: str, primitive: str, scope: _Surroundings, inputs: Sequence[Value]
) -> Iterator[Declared]:
    named = axes_of(eqn.params)
    axes = tuple(a for a in named if any(a == name for name, _ in scope.sizes))
    if not axes:
        return  # an axis of vmap, or of the array itself: nothing is sent
    path = path_of(eqn, scope.path)
    tag = tags.tag_in(path)
    groups, pairs = _find_partners(eqn.params, kind, scope.sizes, axes)
    size = len(groups[0]) if groups else meshes.count_devices(scope.sizes, axes)
    operands = zip(eqn.invars, inputs, strict=True)
    for var, value in list(operands)[: 1 if kind == "ragged-all-to-all" else None]:
        elements, dtype = _elements_and_dtype(var.aval)
        scale = size if kind == "all-gather" else 1
        yield Declared(
            kind=kind,
            primitive=primitive,
            axes=axes,
            group_size=size,
            dtype=dtype.name,
            payload_bytes=scale * elements * dtype.itemsize,
            trips=scope.trips,
            tag=tag,
            source=_source_of(eqn, scope),
            autodiff=tag is None and made_by_autodiff(path),
            elements=scale * elements,
            trips_known=scope.trips_known,
            size_known=scope.size_known,
            foldable=scope.foldable or not value.depends or 0 in (size - 1, elements, scope.trips),
            operand=value.number,
            groups=groups,
            pairs=pairs,
        )


def _declare_reshard(eqn: Eqn, scope: _Surroundings, value: Value) -> Iterator[Declared]:
    aval, target = eqn.invars[0].aval, eqn.params["dst_sharding"]
    given = getattr(aval, "sharding", None)
    if given is None or given == target:
        return
    sizes = meshes.sizes_of(given.mesh)
    sums = tuple(a for a, n in sizes if n > 1 and a in getattr(given.spec, "unreduced", ()))
    axes = sums or tuple(name for name, size in sizes if size > 1)
    elements, dtype = _elements_and_dtype(aval)
    if sums:  # each device sends its shard
        elements = elements * math.prod(given.shard_shape(aval.shape)) // max(aval.size, 1)
    yield Declared(
        kind=RESHARD_OF_A_SUM if sums else RESHARD,
        primitive=RESHARD,
        axes=axes,
        group_size=meshes.count_devices(sizes, axes),
        dtype=dtype.name,
        payload_bytes=elements * dtype.itemsize,
        trips=scope.trips,
        tag=None,
        source=_source_of(eqn, scope),
        autodiff=False,
        elements=elements,
        trips_known=scope.trips_known,
        size_known=False,
        foldable=True,
        operand=value.number,
        groups=meshes.device_groups(sizes, sums) if sums else NO_GROUPS,
    )


def _declare_rule(eqn: Eqn, scope: _Surroundings) -> Declared:
    return Declared(
        kind=RULE,
        primitive=RULE,
        axes=(),
        group_size=0,
        dtype=eqn.outvars[0].aval.dtype.name,
        payload_bytes=0,
        trips=scope.trips,
        tag=None,
        source=_source_of(eqn, scope),
        autodiff=False,
        trips_known=scope.trips_known,
        size_known=False,
    )


def _declare_asked(
    eqn: Eqn, asked: Asked, scope: _Surroundings, inputs: Sequence[Value]
) -> Iterator[Declared]:
    """Declare what an out_sharding asks for; autodiff fills in its own, which nobody wrote."""
    if made_by_autodiff(path_of(eqn, scope.path)):
        return
    elements, dtype = _elements_and_dtype(eqn.outvars[0].aval)
    kinds = [(RESHARD_OF_A_SUM, asked.sums, asked.elements)] if asked.sums else []
    every = tuple(name for name, size in asked.sizes if size > 1)
    kinds += [(RESHARD, every, elements)] if asked.moves else []
    for kind, axes, number in kinds:
        is_sum = kind == RESHARD_OF_A_SUM
        yield Declared(
            kind=kind,
            primitive=RESHARD,
            axes=axes,
            group_size=meshes.count_devices(asked.sizes, axes),
            dtype=dtype.name,
            payload_bytes=number * dtype.itemsize,
            trips=scope.trips,
            tag=None,
            source=_source_of(eqn, scope),
            autodiff=False,
            elements=number,
            trips_known=scope.trips_known,
            size_known=False,
            foldable=scope.foldable or not any(value.depends for value in inputs),
            asked_by=eqn.primitive.name,
            groups=meshes.device_groups(asked.sizes, axes) if is_sum else NO_GROUPS,
        )


def _declare_kernel(
    eqn: Eqn, sent: Sent, scope: _Surroundings, inputs: Sequence[Value]
) -> Declared:
    path = path_of(eqn, scope.path)
    return Declared(
        kind=REMOTE_DMA,
        primitive=eqn.primitive.name,
        axes=sent.axes,
        group_size=meshes.count_devices(scope.sizes, sent.axes),
        dtype=sent.dtype.name,
        payload_bytes=sent.elements * sent.dtype.itemsize,
        trips=scope.trips,
        tag=tags.tag_in(path),
        source=_source_of(eqn, scope),
        autodiff=False,
        elements=sent.elements,
        trips_known=scope.trips_known,
        size_known=sent.known and scope.size_known,
        foldable=scope.foldable or not any(value.depends for value in inputs),
        kernel=_compat.kernel_name(eqn),
        simulated=_compat.is_simulated(eqn),
        operand=inputs[-1].number if inputs else -1,
    )


def _find_partners(
    params: Mapping[str, Any], kind: str, sizes: meshes.Sizes, axes: tuple[str, ...]
) -> tuple[Groups, tuple[tuple[int, int], ...]]:
    if kind == "collective-permute":
        perm = tuple((int(a), int(b)) for a, b in params["perm"])
        return NO_GROUPS, meshes.device_pairs(sizes, axes, perm)
    index_groups = params.get("axis_index_groups")
    if index_groups is not None:
        index_groups = tuple(tuple(int(i) for i in group) for group in index_groups)
    return meshes.device_groups(sizes, axes, index_groups), ()


def _elements_and_dtype(aval: Any) -> tuple[int, np.dtype]:
    """Return the elements of an array type and their dtype; of PRNG keys their words'."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        keys = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        aval = jax.eval_shape(jax.random.key_data, keys)
    return aval.size, np.dtype(aval.dtype)
