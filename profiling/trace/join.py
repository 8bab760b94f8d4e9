"""Join each event to its HLO instruction and source line, and number the runs of each module."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from txcore.profiling.hlo import KINDS
from txcore.profiling.trace.ends import find_ends
from txcore.profiling.trace.model import Event, Place, Program, Rank, Row
from txcore.profiling.trace.programs import RUNS_OTHERS

_UNSAFE = re.compile(r"[^\w]")  # a kernel's name is its instruction's with these as _
_JAX_NAMES = {
    **{"psum": "all-reduce", "pmean": "all-reduce", "pmax": "all-reduce", "pmin": "all-reduce"},
    **{"all_gather": "all-gather", "reduce_scatter": "reduce-scatter"},
    **{"psum_scatter": "reduce-scatter", "all_to_all": "all-to-all"},
    "ppermute": "collective-permute",
}
_LOOKS = re.compile("|".join((*KINDS, *sorted(_JAX_NAMES, reverse=True))))
_NCCL = re.compile(
    r"nccl\w*?_(AllReduce|AllGather|ReduceScatter|AllToAll|SendRecv|Broadcast)", re.IGNORECASE
)
_NCCL_KINDS = {
    **{"allreduce": "all-reduce", "allgather": "all-gather", "alltoall": "all-to-all"},
    **{"reducescatter": "reduce-scatter", "sendrecv": "collective-permute"},
    "broadcast": "collective-broadcast",
}


class Joined(NamedTuple):
    """One execution of an operation, joined.

    Attributes:
      rank, device: whose; the device by its place among those of the rank.
      module, op: the module, and the instruction; a kernel in a command buffer that names none
        keeps the buffer's name.
      run: which execution of the module on the device, from 0.
      run_id: the runtime's number of it, which devices share; 0 where there is none.
      start, end: nanoseconds, on the clock of the process until `clocks` sets it.
      place: where the instruction comes from; None where no program has it.
      row: the collective that it is, if it is one.
      waits_only: whether it only ends a collective that started before.
    """

    rank: int
    device: int
    module: str
    op: str
    run: int
    run_id: int
    start: int
    end: int
    place: Place | None
    row: Row | None
    waits_only: bool = False


def join_rank(rank: Rank) -> tuple[tuple[Joined, ...], tuple[str, ...]]:
    """Join the events of one process to its programs.

    Returns:
      The events by start, without those that only enclose others (a while, a call), and notes.
    """
    notes: list[str] = []
    by_place: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in rank.events:
        by_place[event.device, event.module].append(event)
    chosen = {
        module: _choose_program(module, events, rank.programs)
        for module, events in _group_by_module(rank.events).items()
    }
    joined: list[Joined] = []
    for (device, module), events in by_place.items():
        program = chosen[module]
        names = {_UNSAFE.sub("_", op): op for op in program.places} if program else {}
        runs = _number_runs(events)
        for event, run, end in zip(events, runs, find_ends(events, runs, program), strict=True):
            ended = event._replace(end=end)
            joined.append(_join_event(rank.rank, device, ended, run, program, names))
    absent = sorted(module for module, program in chosen.items() if program is None)
    if absent:
        notes.append(
            f"rank {rank.rank}: no HLO of {', '.join(absent[:3])}"
            f"{' and others' if len(absent) > 3 else ''}: their events have no source, and their "
            "collectives are known by name alone (give --hlo FILE, or record with tx.profile)"
        )
    in_graphs = sum(event.in_graph for event in rank.events)
    if in_graphs:
        notes.append(
            f"rank {rank.rank}: {in_graphs} of {len(rank.events)} events ran in command buffers "
            "(CUDA graphs), where kernels are joined by name alone: tx.profile compiles an "
            "engine's steps without them; elsewhere set XLA_FLAGS=--xla_gpu_enable_command_buffer="
        )
    return tuple(_without_enclosing(joined)), tuple(notes)


def _group_by_module(events: Iterable[Event]) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        found[event.module].append(event)
    return found


def _choose_program(
    module: str, events: Sequence[Event], programs: Sequence[Program]
) -> Program | None:
    """Return the program of this name that has the most of the events' ops."""
    named = [program for program in programs if program.module == module]
    if len(named) < 2:
        return named[0] if named else None
    ops = {event.op for event in events}
    return max(named, key=lambda p: (len(ops & p.places.keys()), p.checked, -len(p.places)))


def _number_runs(events: Sequence[Event]) -> list[int]:
    """Number the executions of a module on one device, by the runtime's numbers if it has them.

    Without those a run begins where the first of the ops that come least often comes again.
    """
    if all(event.run for event in events):
        order: dict[int, int] = {}
        return [order.setdefault(event.run, len(order)) for event in events]
    keys = [(event.op, event.kernel) for event in events]
    counts = Counter(keys)
    least = min(counts.values())
    anchor = next(key for key in keys if counts[key] == least)
    first = keys.index(anchor)
    run, found = (0 if first else -1), []
    for key in keys:
        run += key == anchor
        found.append(run)
    return found


def _join_event(
    rank: int,
    device: int,
    event: Event,
    run: int,
    program: Program | None,
    names: dict[str, str],
) -> Joined:
    op = event.op
    if program is not None and event.in_graph:
        op = names.get(_UNSAFE.sub("_", event.kernel), op)
    place = program.places.get(op) if program is not None else None
    row, ends = None, False
    if place is not None and place.collective and program is not None:
        row, ends = program.rows.get(place.collective), place.ends
    if place is None or (place.collective and row is None):
        row = _guess_row(op, event.kernel)
    return Joined(
        *(rank, device, event.module, op, run, event.run, event.start, event.end, place, row), ends
    )


def _guess_row(op: str, kernel: str) -> Row | None:
    """Return a row for what looks like a collective and is in no program that is known."""
    if found := _NCCL.search(kernel):
        return Row(op, _NCCL_KINDS[found[1].lower()], "unknown", explained=False)
    found = _LOOKS.search(op) if "nccl" in op else _LOOKS.match(op)
    if found is None or "fusion" in op:
        return None
    return Row(op, _JAX_NAMES.get(found[0], found[0]), "unknown", explained=False)


def _without_enclosing(events: list[Joined]) -> Iterator[Joined]:
    """Leave out a loop's or call's event where the events of what it runs are there, too."""
    events.sort(key=lambda e: (e.rank, e.device, e.start, -e.end))
    for event, after in itertools.zip_longest(events, events[1:]):
        encloses = event.place is not None and event.place.opcode in RUNS_OTHERS
        within = after is not None and after.start < event.end and after[:3] == event[:3]
        if encloses and within:
            continue
        yield event
