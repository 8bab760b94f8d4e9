"""Put the events of all ranks on one clock.

Processes of one machine share its clock. Those of others are set by the ends of collectives, which
all ranks of a group reach together: the median difference, over all that two ranks share.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from txcore.profiling.trace.join import Joined
from txcore.profiling.trace.model import Rank, Work

Key = tuple[str, int, str, int]  # module, run, op, which time in the run


def key_runs(events: Sequence[Joined]) -> dict[tuple[int, int, str, int], int]:
    """Return for each (rank, device, module, run) a number that devices share for the same run.

    It is the runtime's where all devices have some in common, else the place counted from the last
    run, since all ranks stop at the same step.
    """
    runs: dict[tuple[int, int, str], dict[int, int]] = defaultdict(dict)
    for event in events:
        runs[event.rank, event.device, event.module].setdefault(event.run, event.run_id)
    found = {}
    for module in {module for _, _, module in runs}:
        own = {place: ids for place, ids in runs.items() if place[2] == module}
        shared = set.intersection(*(set(ids.values()) for ids in own.values()))
        for (rank, device, _), ids in own.items():
            for run, run_id in ids.items():
                number = run_id if shared - {0} else run - len(ids)
                found[rank, device, module, run] = number
    return found


def key_collectives(events: Sequence[Joined]) -> dict[int, Key]:
    """Return for the place of each collective in `events` what it has in common with its peers."""
    runs = key_runs(events)
    seen: dict[tuple[int, int, str, int, str], int] = defaultdict(int)
    found = {}
    for i, event in enumerate(events):
        if event.row is None or event.waits_only:
            continue
        own = (event.rank, event.device, event.module, event.run, event.op)
        run = runs[event.rank, event.device, event.module, event.run]
        found[i] = (event.module, run, event.op, seen[own])
        seen[own] += 1
    return found


def align_ranks(
    ranks: Sequence[Rank], events: Sequence[Joined]
) -> tuple[tuple[Joined, ...], dict[int, tuple[Work, ...]], tuple[str, ...]]:
    """Put all ranks on the clock of the first.

    Args:
      ranks: as read.
      events: of all of them, joined, each on its own clock.

    Returns:
      The events and each rank's host work on one clock, whose 0 is the first event, and notes.
    """
    first = ranks[0]
    offsets, notes = {first.rank: 0}, []
    keys = key_collectives(events)
    for rank in ranks[1:]:
        has_clocks = bool(first.clock and rank.clock)
        by_wall = rank.clock - first.clock if has_clocks else 0
        if has_clocks and rank.host == first.host:
            offsets[rank.rank] = by_wall
            continue
        differences = _end_differences(events, keys, first.rank, rank.rank)
        if not differences:
            offsets[rank.rank] = by_wall
            notes.append(
                f"rank {rank.rank} shares no collective with rank {first.rank}: its clock is "
                f"{'the one of its machine' if has_clocks else 'not set'}, and waiting for it is "
                "not to be trusted"
            )
            continue
        offset = round(statistics.median(differences))
        spread = statistics.median(abs(d - offset) for d in differences)
        offsets[rank.rank] = offset
        moved = f", {(offset - by_wall) / 1e6:+.3f} ms from its own" if has_clocks else ""
        notes.append(
            f"rank {rank.rank}'s clock is set by the ends of {len(differences)} collectives"
            f"{moved}; their ends then differ by {spread / 1e3:.0f} us (median)"
        )
    return (*_shift_all(ranks, events, offsets), tuple(notes))


def _end_differences(
    events: Sequence[Joined], keys: Mapping[int, Key], first: int, other: int
) -> list[int]:
    """Return by how much the ends of the same collectives are later on the first rank's clock."""
    ends: dict[int, dict[Key, int]] = {first: {}, other: {}}
    for i, key in keys.items():
        own = ends.get(events[i].rank)
        if own is not None:
            own[key] = max(events[i].end, own.get(key, events[i].end))
    return [end - ends[other][key] for key, end in ends[first].items() if key in ends[other]]


def _shift_all(
    ranks: Sequence[Rank], events: Sequence[Joined], offsets: Mapping[int, int]
) -> tuple[tuple[Joined, ...], dict[int, tuple[Work, ...]]]:
    zero = min((e.start + offsets[e.rank] for e in events), default=0)

    shift = {rank: offset - zero for rank, offset in offsets.items()}
    moved = tuple(
        e._replace(start=e.start + shift[e.rank], end=e.end + shift[e.rank]) for e in events
    )
    work = {
        r.rank: tuple(
            w._replace(start=w.start + shift[r.rank], end=w.end + shift[r.rank]) for w in r.work
        )
        for r in ranks
    }
    return moved, work
