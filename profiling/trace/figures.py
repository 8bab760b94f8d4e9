"""The figures of a trace: of each collective, operation and device."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from txcore.profiling.trace.join import Joined
from txcore.profiling.trace.model import Program, Row
from txcore.profiling.trace.spans import intersect, length, unite
from txcore.profiling.trace.waits import Device, Wait


@dataclass(frozen=True)
class CollectiveTime:
    """What one collective took, over all devices and runs; times in nanoseconds.

    Attributes:
      module, row: which.
      runs: of its module, counted on every device.
      calls: executions, counted on every device.
      total: the sum of their durations.
      waiting: the part of it until the last device of the group arrived; None where not known.
      hidden: the part of its time, as a union, in which its device computes.
      exposed: the rest of that; hidden + exposed is the union of its executions.
      fastest: the median over executions of the shortest time to move the data on any device.
      predicted_bytes: what a device sends in a run, as the audit says.
      measured_bytes: what it sends in the executions that the trace holds, a run; 0 as those of
        the audit where the program does not say.
      best: bytes a second that this machine was measured to reach; 0 where it was not.
    """

    module: str
    row: Row
    runs: int
    calls: int
    total: int
    waiting: int | None
    hidden: int
    exposed: int
    fastest: int
    predicted_bytes: int
    measured_bytes: int
    best: float = 0.0

    @property
    def moving(self) -> int | None:
        """The part of the total that is not waiting."""
        return None if self.waiting is None else self.total - self.waiting

    @property
    def bus_bandwidth(self) -> float:
        """Bytes a second that each device sends in an execution on the fastest device."""
        return self.row.wire_bytes / self.fastest * 1e9 if self.fastest else 0.0


@dataclass(frozen=True)
class OperationTime:
    """What one operation that is no collective took, over all devices and runs."""

    module: str
    op: str
    opcode: str
    op_name: str
    source: str
    calls: int
    total: int


def time_collectives(
    events: Sequence[Joined],
    waits: Mapping[int, Wait],
    together: Mapping[int, Sequence[int]],
    programs: Sequence[Program],
) -> tuple[CollectiveTime, ...]:
    """Add up the executions of each collective, the longest total first."""
    computing: dict[Device, list[tuple[int, int]]] = defaultdict(list)
    by_row: dict[tuple[str, str], list[int]] = defaultdict(list)
    runs: dict[str, set[tuple[int, int, int]]] = defaultdict(set)
    for i, event in enumerate(events):
        runs[event.module].add((event.rank, event.device, event.run))
        if event.row is None:
            computing[event.rank, event.device].append((event.start, event.end))
        else:
            by_row[event.module, event.row.op].append(i)
    unions = {device: unite(spans) for device, spans in computing.items()}
    found = []
    for (module, _), places in by_row.items():
        own: dict[Device, list[tuple[int, int]]] = defaultdict(list)
        for i in places:
            own[events[i].rank, events[i].device].append((events[i].start, events[i].end))
        busy = {device: unite(spans) for device, spans in own.items()}
        hidden = sum(length(intersect(busy[d], unions.get(d, ()))) for d in busy)
        calls = [i for i in places if not events[i].waits_only]
        row = events[places[0]].row
        assert row is not None
        count = len(runs[module])
        found.append(
            CollectiveTime(
                *(module, row, count, len(calls)),
                total=sum(events[i].end - events[i].start for i in places),
                waiting=_add_waits(calls, waits),
                hidden=hidden,
                exposed=sum(map(length, busy.values())) - hidden,
                fastest=_find_fastest(calls, events, waits, together),
                predicted_bytes=row.wire_bytes * row.trips,
                measured_bytes=row.wire_bytes * len(calls) // count,
            )
        )
    ran = {module for module, _ in by_row} | set(runs)
    found += _list_unseen(programs, ran, {(t.module, t.row.op) for t in found}, runs)
    return tuple(sorted(found, key=lambda t: -t.total))


def _list_unseen(
    programs: Sequence[Program],
    ran: set[str],
    seen: set[tuple[str, str]],
    runs: Mapping[str, set[tuple[int, int, int]]],
) -> list[CollectiveTime]:
    """Return a row without calls for each collective of a program that ran, but it did not."""
    unseen: dict[tuple[str, str], CollectiveTime] = {}
    for program in programs:
        lacks = program.module in ran
        for row in program.rows.values() if lacks else ():
            key = (program.module, row.op)
            if key not in seen and sum(p.module == program.module for p in programs) == 1:
                sent = row.wire_bytes * row.trips
                count = len(runs[program.module])
                unseen[key] = CollectiveTime(program.module, row, count, 0, 0, 0, 0, 0, 0, sent, 0)
    return list(unseen.values())


def _add_waits(calls: Sequence[int], waits: Mapping[int, Wait]) -> int | None:
    known = [waits[i].waiting for i in calls if i in waits]
    return sum(w for w in known if w is not None) if known and None not in known else None


def _find_fastest(
    calls: Sequence[int],
    events: Sequence[Joined],
    waits: Mapping[int, Wait],
    together: Mapping[int, Sequence[int]],
) -> int:
    """Return the median, over meetings, of the shortest time that a device moved data."""
    meetings = {tuple(together.get(i, (i,))) for i in calls}
    shortest = []
    for places in meetings:
        times = []
        for i in places:
            wait = waits.get(i)
            times.append(events[i].end - events[i].start - ((wait.waiting or 0) if wait else 0))
        shortest.append(min(times))
    return round(statistics.median(shortest)) if shortest else 0


def time_operations(events: Sequence[Joined]) -> tuple[OperationTime, ...]:
    """Add up the executions of each other operation, the longest total first."""
    found: dict[tuple[str, str], OperationTime] = {}
    for event in events:
        if event.row is not None:
            continue
        place, key = event.place, (event.module, event.op)
        if key not in found:
            said = (place.opcode, place.op_name, place.source) if place else ("", "", "")
            found[key] = OperationTime(event.module, event.op, *said, 0, 0)
        before = found[key]
        found[key] = replace(
            before, calls=before.calls + 1, total=before.total + event.end - event.start
        )
    return tuple(sorted(found.values(), key=lambda t: -t.total))
