"""Compare two traces: what each collective and each part of the median step took."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from txcore.outside import printable
from txcore.profiling.report.numbers import format_bytes
from txcore.profiling.report.table import cut_middle
from txcore.profiling.trace.figures import CollectiveTime
from txcore.profiling.trace.show.table import format_time
from txcore.profiling.trace.steps import Step
from txcore.profiling.trace.trace_model import TraceModel

_PARTS = ("time", "compute", "hidden", "exposed", "input", "host", "idle", "waiting")


@dataclass(frozen=True)
class Change:
    """One figure in both traces: nanoseconds and bytes a run and device; None where it is absent.

    Attributes:
      what: "step" or "collective".
      name: "exposed"; the kind and name of a collective.
      before, now: nanoseconds.
      bytes_before, bytes_now: on the wire, 0 of a step.
    """

    what: str
    name: str
    before: float | None
    now: float | None
    bytes_before: int = 0
    bytes_now: int = 0


def compare_traces(before: TraceModel, now: TraceModel) -> tuple[Change, ...]:
    """Return the parts of the median step, then every collective of either trace.

    Collectives are the same where their kind, axes and tags are, or without tags their source.
    """
    old, new = (_median_parts(trace.steps) for trace in (before, now))
    found = [Change("step", name, old.get(name), new.get(name)) for name in _PARTS]
    mine, theirs = (_sum_by_name(trace.collectives) for trace in (before, now))
    for name in dict.fromkeys((*mine, *theirs)):
        a, b = mine.get(name), theirs.get(name)
        found.append(
            Change(
                *("collective", name, a[0] if a else None, b[0] if b else None),
                bytes_before=a[1] if a else 0,
                bytes_now=b[1] if b else 0,
            )
        )
    return tuple(found)


def format_changes(changes: Sequence[Change]) -> str:
    """Return the changes as a table."""
    rows = [["", "before", "now", "change", "sent before", "sent now"]]
    rows += [_change_cells(change) for change in changes]
    align = ("left", "right", "right", "right", "right", "right")
    table = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=align)
    lines = [line.rstrip() for line in table.splitlines()]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _change_cells(change: Change) -> list[str]:
    before, now = change.before, change.now
    both = before is not None and now is not None
    ratio = f"{now / before - 1:+.0%}" if both and before else "-"  # type: ignore[operator]
    sent = ["", ""]
    if change.what == "collective":
        sent = [format_bytes(change.bytes_before), format_bytes(change.bytes_now)]
    return [
        cut_middle(printable(change.name), 60),
        "-" if before is None else format_time(before),
        "-" if now is None else format_time(now),
        "new" if before is None and now is not None else "gone" if now is None else ratio,
        *sent,
    ]


def _median_parts(steps: Sequence[Step]) -> dict[str, float]:
    columns = {
        "time": [s.end - s.start for s in steps],
        **{name: [getattr(s, name) for s in steps] for name in _PARTS[1:]},
    }
    return {name: statistics.median(column) for name, column in columns.items() if column}


def _sum_by_name(collectives: Sequence[CollectiveTime]) -> dict[str, tuple[float, int]]:
    found: dict[str, tuple[float, int]] = {}
    for c in collectives:
        named = ",".join(c.row.tags) or c.row.source or c.row.op
        name = " ".join(filter(None, (c.row.kind, "+".join(c.row.axes), named)))
        time, sent = found.get(name, (0.0, 0))
        found[name] = (time + c.total / max(c.runs, 1), sent + c.measured_bytes)
    return found
