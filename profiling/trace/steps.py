"""Part each device's time into steps, and each step into compute, communication and the rest.

A step ends where a run of the step's program ends, and begins where the one before it ended. Each
moment of it is one thing: compute where any operation runs that is no collective; else exposed
communication where a collective runs; else input or host, where the host is seen at that work; else
idle. Communication while something computes is hidden: hidden + exposed is all of it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from txcore.profiling.trace.join import Joined
from txcore.profiling.trace.model import Work
from txcore.profiling.trace.spans import Span, Spans, clip, intersect, length, subtract, unite
from txcore.profiling.trace.waits import Device, Wait


class Step(NamedTuple):
    """One step on one device; all but numbers and times of day in nanoseconds.

    Attributes:
      number: from 0; the same on all devices.
      rank, device: whose.
      start, end: when.
      compute: time in which an operation runs that is no collective.
      hidden, exposed: time of collectives while something computes, and while nothing does.
      input, host: the rest of the time in which the host places a batch or dispatches.
      idle: the rest.
      waiting: in collectives, for others to arrive (part of hidden and exposed).
      own: what others may have to wait for: all of the step but the waiting.
    """

    number: int
    rank: int
    device: int
    start: int
    end: int
    compute: int
    hidden: int
    exposed: int
    input: int
    host: int
    idle: int
    waiting: int
    own: int


def choose_step_program(events: Iterable[Joined]) -> str:
    """Return the module that took the most time of the devices."""
    total: dict[str, int] = defaultdict(int)
    for event in events:
        total[event.module] += event.end - event.start
    return max(sorted(total), key=lambda module: total[module], default="")


def find_steps(
    events: Sequence[Joined],
    work: Mapping[int, Sequence[Work]],
    waits: Mapping[int, Wait],
    module: str,
) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    """Find the steps of all devices.

    Args:
      events: of all ranks, on one clock.
      work: each rank's host work, on the same clock.
      waits: by place in `events`.
      module: the program whose runs are the steps.

    Returns:
      The steps by number, rank and device, and notes on runs that are not whole.
    """
    by_device: dict[Device, list[int]] = defaultdict(list)
    for i, event in enumerate(events):
        by_device[event.rank, event.device].append(i)
    windows: dict[Device, list[Span]] = {}
    notes: list[str] = []
    for device, places in sorted(by_device.items()):
        runs = _find_runs([events[i] for i in places if events[i].module == module])
        whole = _drop_cut_runs(runs, device, notes)
        begun = [w.start for w in work.get(device[0], ())]
        windows[device] = _find_windows(runs, whole, min(begun, default=None))
    counts = {len(found) for found in windows.values() if found}
    if len(counts) > 1:
        notes.append(
            f"the devices have from {min(counts)} to {max(counts)} whole steps: they are counted "
            "from the last one, and the figures are of those that all have"
        )
    shared = min(counts, default=0)
    steps = []
    for device, found in windows.items():
        busy = _unite_device([(events[i], waits.get(i)) for i in by_device[device]])
        busy |= {what: _unite_work(work.get(device[0], ()), what) for what in ("input", "host")}
        for number, window in enumerate(found[len(found) - shared :] if found else ()):
            steps.append(_part_window(number, device, window, busy))
    return tuple(sorted(steps)), tuple(notes)


def _find_runs(events: Iterable[Joined]) -> list[list[Joined]]:
    runs: dict[int, list[Joined]] = defaultdict(list)
    for event in events:
        runs[event.run].append(event)
    return [runs[run] for run in sorted(runs)]


def _drop_cut_runs(runs: list[list[Joined]], device: Device, notes: list[str]) -> set[int]:
    """Return which runs are whole: the first or last may lack ops that all the others have."""
    whole = set(range(len(runs)))
    if len(runs) < 3:
        return whole
    for i in (0, len(runs) - 1):
        others = [{e.op for e in run} for j, run in enumerate(runs) if j != i]
        lacking = set.intersection(*others) - {e.op for e in runs[i]}
        if lacking:
            whole.discard(i)
            word = "first" if i == 0 else "last"
            notes.append(
                f"rank {device[0]} device {device[1]}: the {word} run lacks {len(lacking)} of its "
                "operations: the trace was cut off in it, and it is left out of the steps"
            )
    return whole


def _find_windows(
    runs: Sequence[Sequence[Joined]], whole: set[int], begun: int | None
) -> list[Span]:
    windows: list[Span] = []
    before = None
    for i, run in enumerate(runs):
        end = max(event.end for event in run)
        start = min(event.start for event in run)
        if before is not None:
            start = min(before, end)
        elif begun is not None:
            start = min(start, begun)
        if i in whole:
            windows.append((start, end))
        before = end
    return windows


def _unite_device(events: Sequence[tuple[Joined, Wait | None]]) -> dict[str, Spans]:
    """Return when a device computes, communicates, and waits."""
    return {
        "compute": unite((e.start, e.end) for e, _ in events if e.row is None),
        "moving": unite((e.start, e.end) for e, _ in events if e.row is not None),
        "waiting": unite((e.start, e.start + w.waiting) for e, w in events if w and w.waiting),
    }


def _unite_work(work: Iterable[Work], what: str) -> Spans:
    return unite((each.start, each.end) for each in work if each.what == what)


def _part_window(number: int, device: Device, window: Span, busy: Mapping[str, Spans]) -> Step:
    inside = {what: clip(spans, window) for what, spans in busy.items()}
    compute, moving = inside["compute"], inside["moving"]
    free = subtract((window,), unite((*compute, *moving)))
    inputs = intersect(free, inside["input"])
    free = subtract(free, inputs)
    host = intersect(free, inside["host"])
    waiting = length(inside["waiting"])
    return Step(
        *(number, *device, *window, length(compute)),
        hidden=length(intersect(moving, compute)),
        exposed=length(subtract(moving, compute)),
        input=length(inputs),
        host=length(host),
        idle=length(subtract(free, host)),
        waiting=waiting,
        own=window[1] - window[0] - waiting,
    )
