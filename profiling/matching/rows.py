"""Turn the matched arrays of a compiled program into a report's rows."""

import itertools
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import jax.numpy as jnp

from txcore.profiling import meshes
from txcore.profiling.bandwidth import wire_bytes
from txcore.profiling.declared.collectives import CHOSEN_LATER, RESHARD, RULE, Declared
from txcore.profiling.declared.remote_dma import REMOTE_DMA
from txcore.profiling.hlo import Op
from txcore.profiling.hlo.custom_calls import TPU_KERNEL
from txcore.profiling.hlo.trip_counts import Trips
from txcore.profiling.matching.arrays import Unit
from txcore.profiling.matching.match import Matched
from txcore.profiling.matching.origin import UNEXPLAINED
from txcore.profiling.report import Collective, Fate, Part


@dataclass(frozen=True)
class _Array:
    """One unit, the declarations that it carries out, and the verdict over it."""

    unit: Unit
    places: tuple[int, ...]
    declared: tuple[Declared, ...]
    fates: tuple[str, ...]
    origin: str
    explained: bool
    note: str


def rows_of(
    ops: Sequence[Op],
    matched: Matched,
    declared: Sequence[Declared] | None,
    sizes: Sequence[meshes.Sizes],
) -> tuple[tuple[Collective, ...], tuple[Fate, ...]]:
    """Describe compiled collectives, and what became of the declared ones.

    Args:
      ops: the compiled program's.
      matched: their arrays, and what each carries out.
      declared: the declarations that they were compared with; None without a traced program.
      sizes: the meshes whose axes may name an op's groups; the first that fits does.

    Returns:
      A row for each op and origin of its arrays, and a fate for each declaration.
    """
    rows: list[Collective] = []
    rows_of_declared: dict[int, list[int]] = {}
    arrays = _judge_arrays(matched, declared)
    for place, same_op in itertools.groupby(arrays, key=lambda a: a.unit.op):
        by_verdict: dict[tuple[str, bool], list[_Array]] = {}
        for array in same_op:
            by_verdict.setdefault((array.origin, array.explained), []).append(array)
        for alike in by_verdict.values():
            for i in dict.fromkeys(i for array in alike for i in array.places):
                rows_of_declared.setdefault(i, []).append(len(rows))
            rows.append(_make_row(ops[place], alike, sizes, merged=len(by_verdict) > 1))
    fates = (
        Fate(d, matched.fates[i], tuple(rows_of_declared.get(i, ())))
        for i, d in enumerate(declared or ())
        if d.primitive not in CHOSEN_LATER  # only the rows tell what became of these
    )
    return tuple(rows), tuple(fates)


def _judge_arrays(matched: Matched, declared: Sequence[Declared] | None) -> Iterator[_Array]:
    # An op that was merged has one name for all that it carries.
    names: dict[int, set[str | None]] = {}
    for unit, places in zip(matched.units, matched.links, strict=True):
        if declared is not None:
            names.setdefault(unit.op, set()).update(declared[i].tag for i in places)
    for unit, places in zip(matched.units, matched.links, strict=True):
        of = tuple(declared[i] for i in places) if declared is not None else ()
        fates = dict.fromkeys(fate for i in places for fate in matched.fates[i])
        verdict = (
            _judge_by_line(unit) if declared is None else _judge_by_match(unit, of, names[unit.op])
        )
        yield _Array(unit, places, of, tuple(fates), *verdict)


def _judge_by_line(unit: Unit) -> tuple[str, bool, str]:
    origin = "partitioner" if unit.doubtful else unit.origin
    return origin, origin not in UNEXPLAINED, unit.note


def _judge_by_match(
    unit: Unit, declared: Sequence[Declared], names: Set[str | None]
) -> tuple[str, bool, str]:
    """Return the origin that the match gives an array, whether it is explained, and a note.

    `names` are the tags of all that its op carries.
    """
    if unit.added:
        return unit.origin, False, f"one that was added at {unit.added} was merged into it"
    if declared and unit.kind == "custom-call":
        return "opaque", True, "what its kernel sends is decided when it runs"
    if any(d.primitive == RULE for d in declared):
        return "opaque", True, "a rule of custom_partitioning sends it, which is not in the trace"
    if declared:
        origin = _origin_of_declared(declared)
        if unit.kind == REMOTE_DMA:
            return origin, True, ""
        differs = unit.has_own_line and unit.origin not in (origin, "reshard", "boundary")
        claimed = {tag for tag in unit.claims if tag}
        if claimed and claimed.isdisjoint(names):
            return origin, True, f"compiled under the name {','.join(sorted(claimed))}"
        return origin, True, f"its own line looks like {unit.origin}" if differs else ""
    if unit.origin == "opaque" and unit.target == TPU_KERNEL:
        return "opaque", False, f"{unit.note}, and no kernel of the traced program sends anything"
    if unit.origin in (*UNEXPLAINED, "opaque"):
        return unit.origin, unit.origin == "opaque", unit.note
    tags = [tag for tag in unit.claims if tag]
    claim = f"claims the tag {','.join(tags)}" if tags else f"looks like {unit.origin}"
    return "partitioner", False, f"{claim}, but the traced program does not declare it"


def _origin_of_declared(declared: Sequence[Declared]) -> str:
    if any(d.autodiff for d in declared):
        return "autodiff"
    if all(d.primitive == RESHARD for d in declared):
        return "reshard"
    return "txcore" if any(d.tag for d in declared) else "user"


def _make_row(
    op: Op, arrays: Sequence[_Array], sizes: Sequence[meshes.Sizes], *, merged: bool
) -> Collective:
    axes, group_size = _axes_and_size(op, _sort_meshes(sizes, arrays))
    first = arrays[0]
    if op.kind == "custom-call" and first.declared:  # only its kernel says who talks to whom
        axes, group_size = first.declared[0].axes, first.declared[0].group_size
    parts = tuple(part for array in arrays for part in _parts_of(array, axes, group_size))
    trips = _trips_of(op, arrays)
    notes = [array.note for array in arrays]
    if merged:
        notes.append("merged into one op with others")
    if op.kind != "unknown":
        notes.append(op.problem)
    on_wire = (group_size if op.kind == "all-gather" else 1) * sum(
        array.unit.shape.bytes for array in arrays
    )
    sources = {part.source for part in parts}
    return Collective(
        kind=first.unit.kind if op.kind == "custom-call" else op.kind,
        origin=first.origin,
        tags=tuple(dict.fromkeys(part.tag for part in parts if part.tag)),
        axes=axes,
        group_size=group_size,
        dtype=",".join(dict.fromkeys(part.dtype for part in parts)),
        wire_dtype=",".join(dict.fromkeys(part.wire_dtype for part in parts)),
        payload_bytes=sum(part.payload_bytes for part in parts),
        wire_bytes=wire_bytes(op.kind, max(group_size, 1), on_wire),
        trips=trips.count,
        source=sources.pop() if len(sources) == 1 else first.unit.source,
        op_name=op.op_name,
        explained=first.explained,
        trips_known=trips.known,
        note="; ".join(dict.fromkeys(filter(None, notes))),
        op=op.name,
        parts=parts,
    )


def _parts_of(array: _Array, axes: tuple[str, ...], group_size: int) -> Iterator[Part]:
    unit, wire = array.unit, array.unit.shape.dtype
    if len(array.declared) > 1 and sum(d.elements for d in array.declared) == unit.elements:
        for d in array.declared:  # joined into one flat array: the text does not show the parts
            yield Part(
                d.tag or "", d.dtype, wire, d.elements, d.payload_bytes, d.source, array.fates
            )
        return
    scale = group_size if unit.kind == "all-gather" else 1
    dtypes = {d.dtype for d in array.declared} or {wire}
    sources = {d.source for d in array.declared} or {unit.source}
    tags = dict.fromkeys(d.tag for d in array.declared if d.tag)
    dtype = dtypes.pop() if len(dtypes) == 1 else wire
    payload = scale * unit.shape.bytes
    if dtype != wire and not dtype.startswith("complex"):  # those are sent as two real numbers
        payload = unit.elements * jnp.dtype(dtype).itemsize
    if "rewritten" in array.fates and unit.elements not in {d.elements for d in array.declared}:
        of_a_call = sum(d.payload_bytes * d.trips for d in array.declared)
        payload = of_a_call // unit.trips.count
    yield Part(
        tag=",".join(tags) if array.declared else unit.tag,
        dtype=dtype,
        wire_dtype=wire,
        elements=unit.elements,
        payload_bytes=payload,
        source=unit.added or (sources.pop() if len(sources) == 1 else unit.source),
        fates=array.fates,
        op_name=unit.op_name,
        place="" if unit.added or array.declared else unit.place,
        types=("", "") if array.declared else _types_of(unit, axes, group_size),
    )


def _types_of(unit: Unit, axes: tuple[str, ...], n: int) -> tuple[str, str]:
    """Return an array's type before and after, as jax writes them; other axes are left out.

    "float32[64]{U:data}" holds parts of a sum on the devices along data, "float32[16@data]" shards.
    """
    dims, over = list(unit.laid.dims), axes[0] if len(axes) == 1 else f"({','.join(axes)})"
    if not axes or not n or (unit.kind != "all-reduce" and not 0 <= unit.dim < len(dims)):
        return "", ""

    def write(sizes: list[str], after: str = "") -> str:
        return f"{unit.laid.dtype}[{','.join(sizes)}]{after}"

    whole = [str(size) for size in dims]
    if unit.kind == "all-reduce":
        return write(whole, f"{{U:{over}}}"), write(whole)
    split = list(whole)
    if unit.kind == "all-gather":
        whole[unit.dim] = str(dims[unit.dim] * n)
        split[unit.dim] = f"{whole[unit.dim]}@{over}"
        return write(split), write(whole)
    split[unit.dim] += f"@{over}"
    return write(whole, f"{{U:{over}}}"), write(split)


def _trips_of(op: Op, arrays: Sequence[_Array]) -> Trips:
    """Return how often an op runs; the traced program may know a loop's length."""
    declared = [d for array in arrays for d in array.declared]
    traced = {d.trips for d in declared if d.trips_known}
    if op.trips.known or len(traced) != 1 or not all(d.trips_known for d in declared):
        return op.trips
    return Trips(traced.pop())


def _sort_meshes(sizes: Sequence[meshes.Sizes], arrays: Sequence[_Array]) -> list[meshes.Sizes]:
    """Sort meshes that have all the declared axes to the front."""
    declared = (d for array in arrays for d in array.declared)
    wanted = {axis for d in declared for axis in d.axes}
    return sorted(sizes, key=lambda mesh: not wanted <= {name for name, _ in mesh})


def _axes_and_size(op: Op, sizes: Sequence[meshes.Sizes]) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes that the devices of an op form groups along, and the groups' size."""
    for mesh in sizes:
        if op.kind == "collective-permute":
            axes = meshes.axes_of_pairs(op.pairs, mesh)
        else:
            axes = meshes.axes_of_groups(op.groups, mesh)
        if axes is not None:
            return axes, op.group_size or meshes.count_devices(mesh, axes)
    return (), op.group_size
