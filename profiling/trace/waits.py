"""Part the time of each collective into waiting for the last rank to arrive, and moving data."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from txcore.profiling.trace.clocks import key_collectives
from txcore.profiling.trace.join import Joined
from txcore.profiling.trace.model import Program, Rank, Row

Device = tuple[int, int]  # rank, and place among the rank's devices


class Wait(NamedTuple):
    """One execution of a collective on one device.

    Attributes:
      waiting: nanoseconds until the last device of its group arrived; None where not all of the
        group are in the trace.
      last: whether it was the last to arrive.
    """

    waiting: int | None
    last: bool


def find_waits(
    events: Sequence[Joined], ranks: Sequence[Rank]
) -> tuple[dict[int, Wait], dict[int, tuple[int, ...]]]:
    """Find how long each execution of a collective waited.

    Args:
      events: of all ranks, on one clock.
      ranks: as read.

    Returns:
      By the place of each collective in `events` its wait, and the places of all executions that
      were one meeting of its group, itself among them.
    """
    meetings: dict[tuple[object, ...], dict[Device, int]] = defaultdict(dict)
    for i, key in key_collectives(events).items():
        meetings[key][events[i].rank, events[i].device] = i
    members = _Members(ranks, events)
    waits: dict[int, Wait] = {}
    together: dict[int, tuple[int, ...]] = {}
    for meeting in meetings.values():
        for i in meeting.values():
            if i in together:
                continue
            group = members.group_of(events[i])
            there = tuple(meeting[device] for device in group if device in meeting) or (i,)
            is_whole = bool(group) and len(there) == len(group)
            last = max(events[j].start for j in there)
            for j in there:
                event = events[j]
                waited = min(max(0, last - event.start), event.end - event.start)
                is_last = is_whole and event.start == last and len(there) > 1
                waits[j] = Wait(waited if is_whole else None, is_last)
                together[j] = there
    return waits, together


class _Members:
    """The devices of each collective's groups, as (rank, place)."""

    def __init__(self, ranks: Sequence[Rank], events: Iterable[Joined]) -> None:
        self._by_id = {
            device: (rank.rank, place)
            for rank in ranks
            for place, device in enumerate(rank.devices)
        }
        self._programs: dict[str, list[Program]] = defaultdict(list)
        for rank in ranks:
            for program in rank.programs:
                self._programs[program.module].append(program)
        self._seen: dict[str, set[Device]] = defaultdict(set)
        for event in events:
            self._seen[event.module].add((event.rank, event.device))
        self._found: dict[tuple[str, str], dict[Device, tuple[Device | None, ...]]] = {}

    def group_of(self, event: Joined) -> tuple[Device | None, ...]:
        """Return the devices that an execution waits for, its own among them; () if not known.

        A device of the group that is not in the trace is None.
        """
        row = event.row
        assert row is not None
        key = (event.module, row.op)
        if key not in self._found:
            self._found[key] = self._find_groups(event.module, row)
        return self._found[key].get((event.rank, event.device), ())

    def _find_groups(self, module: str, row: Row) -> dict[Device, tuple[Device | None, ...]]:
        named = next((p.devices for p in self._programs[module] if p.devices), ())
        order: list[Device | None] = [self._by_id.get(device) for device in named]
        if not order:
            order = [*sorted(self._seen[module])]
        found = {}
        groups = [*row.groups] if row.groups else _connect(row.pairs)
        if not groups and row.group_size == len(order):
            groups = [tuple(range(len(order)))]
        for group in groups:
            devices = tuple(order[i] if i < len(order) else None for i in group)
            found.update({device: devices for device in devices if device is not None})
        return found


def _connect(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Return the devices that a permute connects, as groups."""
    group_of: dict[int, set[int]] = {}
    for source, target in pairs:
        merged = group_of.get(source, {source}) | group_of.get(target, {target})
        group_of.update(dict.fromkeys(merged, merged))
    return list({id(group): tuple(sorted(group)) for group in group_of.values()}.values())
