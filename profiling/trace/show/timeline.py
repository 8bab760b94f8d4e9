"""Draw one step of all devices as lanes of pieces."""

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from txcore.profiling.trace.join import Joined
from txcore.profiling.trace.show.table import format_time
from txcore.profiling.trace.spans import Span
from txcore.profiling.trace.steps import Step
from txcore.profiling.trace.trace_model import TraceModel

_MOST_LANES = 64
Piece = tuple[str, float, float, str]  # kind, from, to, and what it says


class Lane(NamedTuple):
    """One line of the drawing: its name, and its pieces in its own coordinates."""

    name: str
    pieces: tuple[Piece, ...]


def choose_step(steps: Sequence[Step]) -> tuple[int, Span] | None:
    """Return the number and time of the step whose length is the median; None without steps."""
    windows = {
        n: (
            min(s.start for s in steps if s.number == n),
            max(s.end for s in steps if s.number == n),
        )
        for n in {step.number for step in steps}
    }
    if not windows:
        return None
    middle = statistics.median_low(end - start for start, end in windows.values())
    number = next(n for n in sorted(windows) if windows[n][1] - windows[n][0] == middle)
    return number, windows[number]


def draw_lanes(trace: TraceModel, window: Span, width: int) -> list[Lane]:
    """Return two lanes for each device, compute and collectives, and one for each rank's host."""
    lanes = []
    inside = [e for e in trace.events if e.start < window[1] and e.end > window[0]]
    for rank, device in trace.devices[:_MOST_LANES]:
        own = [e for e in inside if (e.rank, e.device) == (rank, device)]
        name = f"rank {rank} {trace.platform} {device}"
        compute = [("compute", e.start, e.end, e.op) for e in own if e.row is None]
        moving = [_collective_piece(e) for e in own if e.row is not None]
        lanes.append(Lane(name, tuple(_merge(compute, window, width))))
        if moving:
            waits = [_waiting_piece(e, trace) for e in own if e.row is not None]
            pieces = (*_merge(moving, window, width), *_merge(waits, window, width))
            lanes.append(Lane(f"{name} wire", pieces))
    for rank in sorted({rank for rank, _ in trace.devices[:_MOST_LANES]}):
        work = [(w.what, w.start, w.end, w.what) for w in trace.work.get(rank, ())]
        lanes.append(Lane(f"rank {rank} host", tuple(_merge(work, window, width))))
    return lanes


def _collective_piece(event: Joined) -> tuple[str, int, int, str]:
    assert event.row is not None
    tags = ",".join(event.row.tags) or event.op
    said = f"{event.row.kind} {tags} {event.row.source}, {format_time(event.end - event.start)}"
    return "collective", event.start, event.end, said


def _waiting_piece(event: Joined, trace: TraceModel) -> tuple[str, int, int, str]:
    waited = trace.waiting.get((event.rank, event.device, event.start), 0)
    return "waiting", event.start, event.start + waited, f"waiting {format_time(waited)}"


def _merge(pieces: Iterable[tuple[str, int, int, str]], window: Span, width: int) -> list[Piece]:
    """Scale pieces to the lane; those that are less than a pixel apart become one."""
    scale = width / max(window[1] - window[0], 1)
    found: list[Piece] = []
    for kind, start, end, said in sorted(pieces, key=lambda piece: (piece[1], piece[2])):
        if start >= window[1] or end <= window[0] or end <= start:
            continue
        low = (max(start, window[0]) - window[0]) * scale
        high = (min(end, window[1]) - window[0]) * scale
        if found and found[-1][0] == kind and low - found[-1][2] < 0.5:
            last = found[-1]
            short = high - last[1] < 2 or said == last[3]
            if short or kind in ("compute", "input", "host"):
                found[-1] = (kind, last[1], max(high, last[2]), last[3] if short else "")
                continue
        found.append((kind, low, high, said))
    return found
