"""From a module's text to what its events are joined to: source lines, and its collectives."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from txcore.profiling.audit import audit_text
from txcore.profiling.declared.source import user_source_line
from txcore.profiling.hlo import KINDS, Computation, Instruction, Module, Op, attributes
from txcore.profiling.hlo.collectives import collectives_of
from txcore.profiling.hlo.text import read_modules
from txcore.profiling.report import Collective
from txcore.profiling.trace.model import Place, Program, Row

RUNS_OTHERS = ("while", "call", "conditional", "async-start")
_NAMES_ONLY = ("get-tuple-element", "tuple", "bitcast", "opt-barrier")
_MOST_WRAPPED = 8  # computations within each other that a start may hide a collective in


def read_program(
    hlo: str, rows: Sequence[Row] | None = None, devices: Sequence[int] = (), *, checked: bool
) -> Program:
    """Read a program that ran from its optimized HLO.

    Args:
      hlo: the text of its module.
      rows: what an audit said of its collectives; by default its own lines decide.
      devices: the ids of the devices of its mesh, in order.
      checked: whether that audit had a traced program to compare with.

    Returns:
      The program.

    Raises:
      ValueError: there is no module in the text.
    """
    modules = read_modules(hlo)
    if not modules:
        raise ValueError("needs the text of an HLO module, got none")
    ops = {op.name: op for op in collectives_of(modules)}
    said = rows_of_report(audit_text(hlo).collectives) if rows is None else rows
    found = {row.op: _with_groups(row, ops.get(row.op)) for row in said}
    places: dict[str, Place] = {}
    users: dict[str, tuple[str, ...]] = {}
    callers: dict[str, str] = {}
    for module in modules:
        for computation in module.computations.values():
            users.update(_find_users(computation))
        callers.update(_find_callers(module))
        by_name = {i.name: i for c in module.computations.values() for i in c.instructions}
        for instruction in by_name.values():
            places[instruction.name] = _place_of(instruction, module, by_name, ops)
    return Program(
        *(modules[0].name, places, found, checked, tuple(devices)), users=users, caller=callers
    )


def _find_users(computation: Computation) -> dict[str, tuple[str, ...]]:
    """Return for each instruction those that need its result and run, past what only names it."""
    users: dict[str, list[str]] = defaultdict(list)
    for instruction in reversed(computation.instructions):
        own = users[instruction.name]
        for operand in instruction.operand_names:
            users[operand] += own if instruction.opcode in _NAMES_ONLY else [instruction.name]
    return {name: tuple(dict.fromkeys(found)) for name, found in users.items() if found}


def _find_callers(module: Module) -> dict[str, str]:
    """Return for each instruction the one loop or call that runs its computation."""
    calls: dict[str, set[str]] = defaultdict(set)
    for computation in module.computations.values():
        for instruction in computation.instructions:
            if instruction.opcode in RUNS_OTHERS:
                for name in instruction.callees:
                    calls[name].add(instruction.name)
    return {
        instruction.name: next(iter(calls[name]))
        for name, computation in module.computations.items()
        if len(calls[name]) == 1
        for instruction in computation.instructions
    }


def rows_of_report(collectives: Iterable[Collective]) -> list[Row]:
    """Return a row for each op of a report; the arrays of a merged one are added up."""
    found: dict[str, Row] = {}
    for c in collectives:
        row = Row(
            *(c.op, c.kind, c.origin, c.tags, c.axes, c.group_size, c.dtype, c.source),
            payload_bytes=c.payload_bytes if c.payload_known else 0,
            wire_bytes=c.wire_bytes if c.wire_known else 0,
            trips=c.trips,
            trips_known=c.trips_known,
            explained=c.explained,
        )
        found[c.op] = _add_rows(found[c.op], row) if c.op in found else row
    return list(found.values())


def _add_rows(a: Row, b: Row) -> Row:
    worse = a if not a.explained else b
    return replace(
        a,
        origin=worse.origin if not worse.explained else a.origin,
        tags=tuple(dict.fromkeys((*a.tags, *b.tags))),
        dtype=",".join(dict.fromkeys((*a.dtype.split(","), *b.dtype.split(",")))),
        payload_bytes=a.payload_bytes + b.payload_bytes,
        wire_bytes=a.wire_bytes + b.wire_bytes,
        explained=a.explained and b.explained,
    )


def _with_groups(row: Row, op: Op | None) -> Row:
    return row if op is None else replace(row, groups=op.groups, pairs=op.pairs)


def _place_of(
    instruction: Instruction,
    module: Module,
    by_name: Mapping[str, Instruction],
    ops: Mapping[str, Op],
) -> Place:
    is_done = instruction.opcode.endswith("-done")
    start = by_name.get(next(iter(instruction.operand_names), "")) if is_done else instruction
    described = _find_described(instruction, module)
    return Place(
        instruction.opcode,
        attributes.op_name(described),
        user_source_line(attributes.source_frames(described, module)),
        "" if start is None else _collective_of(start, module, ops),
        is_done,
    )


def _find_described(instruction: Instruction, module: Module) -> Instruction:
    """Return the instruction, or where a fusion has no metadata the last one inside that has."""
    if instruction.opcode != "fusion" or attributes.op_name(instruction):
        return instruction
    for name in instruction.callees[:1]:
        inside = module.computations[name].instructions if name in module.computations else ()
        return next((i for i in reversed(inside) if attributes.op_name(i)), instruction)
    return instruction


def _collective_of(instruction: Instruction, module: Module, ops: Mapping[str, Op]) -> str:
    """Return the collective that an instruction is, or that it runs as a start or a fusion."""
    if instruction.name in ops:
        return instruction.name
    if instruction.opcode == "fusion" or instruction.opcode.endswith("-start"):
        return _inside(instruction, module, ops, _MOST_WRAPPED)
    return ""


def _inside(instruction: Instruction, module: Module, ops: Mapping[str, Op], deepest: int) -> str:
    """Return the first collective in the computations that an instruction runs, or ""."""
    for name in instruction.callees if deepest else ():
        computation = module.computations.get(name)
        for inner in computation.instructions if computation else ():
            if inner.opcode.removesuffix("-start") in KINDS and inner.name in ops:
                return inner.name
            if found := _inside(inner, module, ops, deepest - 1):
                return found
    return ""
