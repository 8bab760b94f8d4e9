"""Show a trace in the terminal, and as plain data."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from txcore.outside import printable
from txcore.profiling.report.numbers import format_bytes
from txcore.profiling.report.table import cut_middle
from txcore.profiling.trace.figures import CollectiveTime, OperationTime
from txcore.profiling.trace.steps import Step
from txcore.profiling.trace.stragglers import Straggler
from txcore.profiling.trace.trace_model import TraceModel

_COLLECTIVES = (
    *("kind", "axes", "n", "calls", "a call", "waiting", "moving", "bus GB/s", "of best"),
    *("sent a run", "audit", "origin", "tags, source"),
)
_STEPS = ("step", "time", "compute", "comm", "hidden", "exposed", "input", "host", "idle")
_OPERATIONS = ("operation", "calls", "a call", "total", "op_name, source")
_MOST_STEPS, _MOST_OPERATIONS, _MOST_COLLECTIVES = 12, 8, 40
_PARTS = ("compute", "hidden", "exposed", "input", "host", "idle", "waiting", "own")


def format_time(nanoseconds: float) -> str:
    """Write a time with three digits and its unit.

    Example:
      >>> format_time(1234), format_time(20_500_000), format_time(0)
      ('1.23 us', '20.5 ms', '0 us')
    """
    number, unit = nanoseconds / 1e3, "us"
    for larger in ("ms", "s"):
        if number < 999.5:
            break
        number, unit = number / 1e3, larger
    return f"{number:.3g} {unit}"


def format_trace(trace: TraceModel) -> str:
    """Return the report: tables of collectives, steps and operations, stragglers, notes."""
    ranks = len({rank for rank, _ in trace.devices})
    lines = [
        f"{len(trace.devices)} {trace.platform} device(s) of {ranks} rank(s), "
        f"{len({s.number for s in trace.steps})} step(s) of {trace.program or 'no program'}; "
        f"{trace.joined[0]} of {trace.joined[1]} events joined to HLO",
    ]
    if trace.collectives:
        cells = [_collective_cells(c) for c in trace.collectives[:_MOST_COLLECTIVES]]
        lines += ["", *_table(_COLLECTIVES, cells, left=(0, 1, 11, 12))]
        if (more := len(trace.collectives) - _MOST_COLLECTIVES) > 0:
            lines.append(f"and {more} collectives more: --json has all")
    if trace.steps:
        lines += ["", *_table(_STEPS, list(_step_rows(trace.steps)), left=(0,))]
    if trace.operations:
        cells = [_operation_cells(o) for o in trace.operations[:_MOST_OPERATIONS]]
        lines += ["", *_table(_OPERATIONS, cells, left=(0, 4))]
    lines += ["", *(f"straggler: {say_straggler(s)}" for s in trace.stragglers)]
    lines += [f"note: {printable(note)}" for note in trace.notes]
    return "\n".join([*lines, write_verdict(trace)])


def write_verdict(trace: TraceModel) -> str:
    """Return in one line whether all collectives that ran were declared."""
    ran = [c for c in trace.collectives if c.calls]
    if not trace.ok:
        named = "; ".join(
            f"{c.row.kind} {c.row.op} of {c.module} ({c.row.origin}"
            f"{', ' + c.row.source if c.row.source else ''})"
            for c in trace.undeclared[:3]
        )
        more = len(trace.undeclared) - 3
        and_more = f" and {more} more" if more > 0 else ""
        return printable(f"failed: the program did not declare {named}{and_more}")
    if not ran:
        return "ok: no collective ran"
    by = (
        "" if trace.checked else ", by the words of the compiled program (no traced one to compare)"
    )
    return f"ok: every collective that ran ({len(ran)}) was declared{by}"


def say_straggler(straggler: Straggler) -> str:
    """Say in a line who is slow, and against whom."""
    device = f" device {straggler.device}" if straggler.device >= 0 else ""
    own, usual = format_time(straggler.own), format_time(straggler.usual)
    who, cause = f"rank {straggler.rank}{device}", f"most of it in {straggler.cause}"
    if straggler.against == "others":
        return f"{who} works {own} a step, the others {usual}: {cause}"
    return f"{who} worked {own} in step {straggler.step}, {usual} in its other steps: {cause}"


def _table(head: Sequence[str], rows: list[list[str]], left: Sequence[int]) -> list[str]:
    align = ["left" if i in left else "right" for i in range(len(head))]
    table = tabulate([list(head), *rows], tablefmt="plain", disable_numparse=True, colalign=align)
    lines = [line.rstrip() for line in table.splitlines()]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _collective_cells(c: CollectiveTime) -> list[str]:
    row, calls = c.row, max(c.calls, 1)
    named = ",".join(row.tags) or row.op
    return [
        row.kind.removeprefix("collective-"),
        cut_middle(printable("+".join(row.axes) or "-"), 12),
        str(row.group_size or "?"),
        str(c.calls),
        format_time(c.total / calls),
        "?" if c.waiting is None else format_time(c.waiting / calls),
        "?" if c.moving is None else format_time(c.moving / calls),
        f"{c.bus_bandwidth / 1e9:.3g}" if c.bus_bandwidth else "?",
        f"{c.bus_bandwidth / c.best:.0%}" if c.best and c.bus_bandwidth else "-",
        format_bytes(c.measured_bytes),
        format_bytes(c.predicted_bytes) + ("" if row.trips_known else "+"),
        row.origin + ("" if row.explained else "!"),
        cut_middle(printable(f"{named} {row.source}".strip()), 40),
    ]


def _step_rows(steps: Sequence[Step]) -> Iterable[list[str]]:
    """Yield the mean over devices of each step, or of the longest ones, and the median step."""
    numbers = sorted({step.number for step in steps})
    rows = {n: _mean_parts([s for s in steps if s.number == n]) for n in numbers}
    shown = numbers
    if len(numbers) > _MOST_STEPS:
        shown = sorted(sorted(numbers, key=lambda n: -rows[n][0])[: _MOST_STEPS // 2])
    for number in shown:
        yield [str(number), *map(format_time, rows[number])]
    if len(numbers) > 1:
        medians = [statistics.median(column) for column in zip(*rows.values(), strict=True)]
        yield ["median", *map(format_time, medians)]


def _mean_parts(steps: Sequence[Step]) -> list[float]:
    columns = [
        (
            *(s.end - s.start, s.compute, s.hidden + s.exposed, s.hidden, s.exposed),
            *(s.input, s.host, s.idle),
        )
        for s in steps
    ]
    return [statistics.fmean(column) for column in zip(*columns, strict=True)]


def _operation_cells(o: OperationTime) -> list[str]:
    where = " ".join(filter(None, (o.op_name, o.source)))
    return [
        cut_middle(printable(o.op), 34),
        str(o.calls),
        format_time(o.total / o.calls),
        format_time(o.total),
        cut_middle(printable(where or "-"), 60),
    ]


def describe_trace(trace: TraceModel) -> dict[str, Any]:
    """Return the figures as plain lists, numbers and strings; times in seconds."""
    return {
        "ok": trace.ok,
        "checked": trace.checked,
        "verdict": write_verdict(trace),
        "platform": trace.platform,
        "program": trace.program,
        "devices": [{"rank": rank, "device": device} for rank, device in trace.devices],
        "joined_events": trace.joined[0],
        "events": trace.joined[1],
        "collectives": [_collective_dict(c) for c in trace.collectives],
        "steps": [_step_dict(step) for step in trace.steps],
        "operations": [
            {
                **{"module": o.module, "op": o.op, "opcode": o.opcode, "op_name": o.op_name},
                **{"source": o.source, "calls": o.calls, "seconds": o.total / 1e9},
            }
            for o in trace.operations
        ],
        "stragglers": [
            {
                **{"rank": s.rank, "device": None if s.device < 0 else s.device},
                **{"against": s.against, "step": None if s.step < 0 else s.step},
                **{"own_seconds": s.own / 1e9, "usual_seconds": s.usual / 1e9, "cause": s.cause},
            }
            for s in trace.stragglers
        ],
        "notes": list(trace.notes),
    }


def _collective_dict(c: CollectiveTime) -> dict[str, Any]:
    row = c.row
    return {
        **{"module": c.module, "op": row.op, "kind": row.kind, "origin": row.origin},
        **{"explained": row.explained, "tags": list(row.tags), "axes": list(row.axes)},
        **{"group_size": row.group_size or None, "dtype": row.dtype, "source": row.source},
        **{"runs": c.runs, "calls": c.calls, "seconds": c.total / 1e9},
        "waiting_seconds": None if c.waiting is None else c.waiting / 1e9,
        "moving_seconds": None if c.moving is None else c.moving / 1e9,
        "hidden_seconds": c.hidden / 1e9,
        "exposed_seconds": c.exposed / 1e9,
        "payload_bytes": row.payload_bytes,
        "predicted_wire_bytes": c.predicted_bytes,
        "predicted_is_least": not row.trips_known,
        "measured_wire_bytes": c.measured_bytes,
        "bus_bandwidth": c.bus_bandwidth or None,
        "best_bus_bandwidth": c.best or None,
    }


def _step_dict(step: Step) -> dict[str, Any]:
    return {
        **{"number": step.number, "rank": step.rank, "device": step.device},
        **{"start": step.start / 1e9, "seconds": (step.end - step.start) / 1e9},
        **{f"{name}_seconds": getattr(step, name) / 1e9 for name in _PARTS},
    }
