"""Write all ranks on one clock as a file that ui.perfetto.dev and chrome://tracing open."""

import gzip
import json
import os
from collections.abc import Iterator
from typing import Any

from txcore.profiling.trace.trace_model import TraceModel

_HOST, _STEPS = 1000, 1001  # lines beside those of the devices


def write_perfetto(trace: TraceModel, path: str | os.PathLike[str]) -> None:
    """Write a trace in the Trace Event Format, compressed where the name ends in .gz.

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU

    Args:
      trace: what to write. A process is a rank; its lines are its devices, their steps and host.
      path: the file; it is replaced whole or stays as it is.

    Raises:
      OSError: it cannot be written.
    """
    content = {"displayTimeUnit": "ns", "traceEvents": [*_list_events(trace)]}
    data = json.dumps(content, separators=(",", ":")).encode()
    target = os.path.realpath(path)
    draft = f"{target}.tmp"
    try:
        with open(draft, "wb") as file:
            file.write(gzip.compress(data, mtime=0) if target.endswith(".gz") else data)
        os.replace(draft, target)
    finally:
        if os.path.exists(draft):
            os.remove(draft)


def _list_events(trace: TraceModel) -> Iterator[dict[str, Any]]:
    for rank in sorted({rank for rank, _ in trace.devices}):
        yield _name_line("process_name", rank, 0, f"rank {rank}")
        yield _name_line("thread_name", rank, _HOST, "host")
    for rank, device in trace.devices:
        yield _name_line("thread_name", rank, device, f"{trace.platform} {device}")
        yield _name_line("thread_name", rank, _STEPS + device, f"{trace.platform} {device} steps")
    for step in trace.steps:
        yield _span(step.rank, _STEPS + step.device, f"step {step.number}", step.start, step.end)
    for rank, work in trace.work.items():
        for each in work:
            yield _span(rank, _HOST, each.what, each.start, each.end)
    for event in trace.events:
        said: dict[str, Any] = {"module": event.module, "run": event.run}
        if event.place is not None:
            said |= {"op_name": event.place.op_name, "source": event.place.source}
        if event.row is not None:
            said |= {"tags": ",".join(event.row.tags), "origin": event.row.origin}
            said |= {"axes": ",".join(event.row.axes), "wire_bytes": event.row.wire_bytes}
        name = event.op if event.row is None else f"{event.row.kind} {event.op}"
        category = "compute" if event.row is None else "collective"
        yield _span(event.rank, event.device, name, event.start, event.end) | {
            "cat": category,
            "args": said,
        }


def _name_line(what: str, rank: int, line: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": line, "args": {"name": name}}


def _span(rank: int, line: int, name: str, start: int, end: int) -> dict[str, Any]:
    times = {"ts": start / 1e3, "dur": max(end - start, 0) / 1e3}  # microseconds
    return {"ph": "X", "pid": rank, "tid": line, "name": name, **times}
