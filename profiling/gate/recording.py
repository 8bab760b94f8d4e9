"""Write down every program that a process compiles, one line of JSON each, for another to read.

`txcore inspect -- python train.py` starts the script with a folder on its import path that holds
`jax_plugins/txcore_inspect.py`. jax imports that in every process that starts its backends, before
anything is compiled, and calls `initialize`, which calls `record_programs`. So the script, its
interpreter and its arguments are as they would be, and the processes that it starts are seen too.
"""

import collections
import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import jax

from txcore import _compat
from txcore.profiling.gate.hooks import watch_process
from txcore.profiling.gate.watches import Compilation
from txcore.profiling.report import Collective, Report

_NAME_BYTES = 60  # of a page's file name


def record_programs(settings: Mapping[str, Any]) -> None:
    """Write down from now on what this process compiles, and those that it forks.

    Args:
      settings: "folder", where each process writes PID.jsonl; "allow", the origins to let through;
        "first", after how many programs with a collective to end the process, or None; "html", a
        folder for pages, or None.
    """
    recorder = _Recorder(settings["folder"], tuple(settings["allow"]), settings["first"])
    recorder.write({"what": "began", "argv": sys.argv, "jax": jax.__version__})
    _compat.tell_of_unwatched(lambda kind: recorder.write({"what": "unseen", "kind": kind}))
    watch_process(replace(recorder, html=settings["html"]))


@dataclass(frozen=True)
class _Recorder:
    """The watch of a process whose programs are written down."""

    folder: str
    allow: tuple[str, ...]
    first: int | None
    html: str | None = None

    def see_program(self, program: Compilation) -> None:
        """Write down a program; end the process after the last that is wanted."""
        report = program.report.allowing(self.allow)
        number = _count_program()
        line = _describe(program, report) | {"what": "program"}
        if self.html is not None and report.collectives:
            line["page"] = _write_page(report, program.name, number, self.html)
        self.write(line)
        if report.collectives and _count_communicating() == self.first:
            self.write({"what": "stopped"})
            _end_process()

    def see_failure(self, name: str, error: Exception) -> None:
        """Write down that a program could not be audited."""
        self.write({"what": "failed", "text": f"{name}: {type(error).__name__}: {error}"})

    def see_move(self, row: Callable[[], Collective | None]) -> None:
        """Write down a `jax.device_put` that sends, the first of each line and kind."""
        if (found := row()) is not None:
            key = (found.source, found.payload_bytes, found.axes)
            _moves[key] += 1
            if _moves[key] == 1:
                self.write({"what": "move", "source": found.source, "wire_bytes": found.wire_bytes})

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line to this process's file; what is written stays if the process is killed."""
        data = (json.dumps(line) + "\n").encode()
        with _lock:
            file = os.open(
                os.path.join(self.folder, f"{os.getpid()}.jsonl"),
                os.O_WRONLY | os.O_CREAT | os.O_APPEND,
                0o600,
            )
            try:
                os.write(file, data)
            finally:
                os.close(file)


_lock = threading.Lock()
_moves: "collections.Counter[Any]" = collections.Counter()
_counts = {"programs": 0, "communicating": 0}


def _count_program() -> int:
    with _lock:
        _counts["programs"] += 1
        return _counts["programs"]


def _count_communicating() -> int:
    with _lock:
        _counts["communicating"] += 1
        return _counts["communicating"]


def _describe(program: Compilation, report: Report) -> dict[str, Any]:
    rows = [
        (row.kind, row.axes, row.dtype, row.payload_bytes, row.trips, row.origin, row.tags)
        for row in report.collectives
    ]
    alone = program.devices == 1 and not report.collectives  # nobody is there to talk to
    return {
        "name": program.name,
        "called_at": program.called_at,
        "devices": program.devices,
        "processes": program.processes,
        "rank": jax.process_index(),
        "ranks": jax.process_count(),
        "status": "proved" if alone else report.status,
        "text": "\n".join(filter(None, [str(report), report.why()])) if report.collectives else "",
        "digest": hashlib.sha256(repr(rows).encode()).hexdigest(),
        "report": report.to_dict(),
    }


def _write_page(report: Report, name: str, number: int, folder: str) -> str:
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:_NAME_BYTES]
    page = f"{os.getpid()}-{number:04d}-{plain}.html"
    with contextlib.suppress(OSError):  # the page is missing then, as the summary says
        report.to_html(Path(folder) / page)
        return page
    return ""


def _end_process() -> NoReturn:
    """End this process well, with what it has printed."""
    if threading.current_thread() is not threading.main_thread():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    if "pytest" in sys.modules:  # which takes SystemExit for a test that failed
        sys.modules["pytest"].exit("txcore inspect has seen --first programs", returncode=0)
    raise SystemExit(0)
