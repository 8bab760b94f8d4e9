"""Loggers: functions of a record. An engine calls them on rank 0 alone."""

import csv
import io
import itertools
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import jax

from txcore.kernels.common.checks import whole_number
from txcore.outside import printable
from txcore.path_rules import leaf_names
from txcore.train import event_file
from txcore.train.log_rows import RowFile

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """Hold what a logger is told: a step, an evaluation, or the end of `fit`."""

    kind: str  # "step", "eval" or "end"
    step: int  # completed steps of the run, including those before this call of fit
    total_steps: int | None  # None where the data's length is unknown
    metrics: Metrics  # Python floats, or lists for arrays
    seconds: float  # of training so far, without compilation and evaluation
    examples: int  # so far, without padding
    compile_seconds: float  # of the engine so far
    since: tuple[int, float, int] = (0, 0.0, 0)  # step, seconds, examples where fit began

    @property
    def examples_per_second(self) -> float:
        """The mean throughput so far."""
        return self.examples / self.seconds if self.seconds else 0.0

    @property
    def eta_s(self) -> float | None:
        """The seconds left at the mean pace of this call of fit."""
        made = self.step - self.since[0]
        if self.total_steps is None or made <= 0:
            return None
        return (self.seconds - self.since[1]) / made * (self.total_steps - self.step)


Logger = Callable[[Record], None]


class Basic:
    """Print one aligned line every `every` steps; on a terminal, a line in place with a bar.

    Args:
      every: steps between two lines.
      unit: the word for one example.
      stream: where to print; by default standard output.

    Raises:
      ValueError: `every` is not positive.

    Example:
      >>> log = tx.loggers.Basic()
      >>> log(tx.loggers.Record("step", 100, 400, {"loss": 0.25}, 2.0, 12800, 1.0))
      step   100/400   25.0%  loss 0.2500    20.0 ms    6,400 examples/s  ETA 0:06
    """

    def __init__(
        self, every: int = 100, *, unit: str = "examples", stream: TextIO | None = None
    ) -> None:
        steps = whole_number(every)
        if steps is None or steps < 1:
            raise ValueError(f"Basic needs every= at least 1, got {every}")
        self._every, self._unit, self._stream = steps, unit, stream
        self._last: Record | None = None

    def __call__(self, record: Record) -> None:
        """Print the record if it is due."""
        stream = self._stream or sys.stdout
        terminal = stream.isatty()
        last = record.step == record.total_steps
        due = record.kind != "step" or last or record.step == 1 or record.step % self._every == 0
        if not due and not terminal:
            return
        text = format_line(record, self._last, self._unit)
        if terminal:
            text = "\r\033[K" + ("" if due else _draw_bar(record)) + text
        stream.write(text + ("\n" if due else ""))
        stream.flush()
        if due:
            self._last = None if record.kind == "end" else record


def _draw_bar(record: Record, width: int = 20) -> str:
    if record.total_steps is None:
        return ""
    filled = width * record.step // max(record.total_steps, 1)
    return f"[{'#' * filled}{'.' * (width - filled)}] "


def format_line(record: Record, since: Record | None, unit: str) -> str:
    """Format the record as one aligned line; the pace is measured from the record `since`."""
    total = f"/{record.total_steps}" if record.total_steps is not None else ""
    parts = [f"{record.kind:<4} {record.step:>5}{total}"]
    if record.total_steps:
        parts.append(f"{100 * record.step / record.total_steps:5.1f}%")
    parts += [f"{key} {_format_number(value)}" for key, value in record.metrics.items()]
    if record.kind == "end":
        since = None
    if record.kind != "eval":
        parts.append(_format_pace(record, since, unit))
    if record.kind == "step" and record.eta_s is not None:
        parts.append(f"ETA {int(record.eta_s) // 60}:{int(record.eta_s) % 60:02d}")
    if record.kind == "end":
        parts.append(f"{record.seconds:.1f} s, and {record.compile_seconds:.1f} s to compile")
    return "  ".join(parts)


def _format_pace(record: Record, since: Record | None, unit: str) -> str:
    before = record.since
    if since is not None and since.since == record.since:  # else it belongs to another fit
        before = since.step, since.seconds, since.examples
    steps, seconds = record.step - before[0], record.seconds - before[1]
    rate = (record.examples - before[2]) / seconds if seconds else 0.0
    return f"{1e3 * seconds / max(steps, 1):6.1f} ms {rate:8,.0f} {unit}/s"


def _format_number(value: Any) -> str:
    """Format a metric with at least three digits: 0.2500, and 3e-5 as such."""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 1e6 or not math.isfinite(value):
        return f"{value:.4f}"
    digits, e, exponent = f"{value:.4g}".partition("e")
    return digits + (f"e{int(exponent)}" if e else "")


class JSONL:
    """Append each record as one line of JSON to a file, flushed at once.

    A run that goes on from a checkpoint goes on in its file: rows of steps that it makes again are
    moved to a file beside it, whose name ends with ".old". So are all of them where a run starts
    anew.

    Args:
      path: the file, "~" for the home; its folder is made if it is missing.

    Raises:
      OSError: the file cannot be written.
      ValueError: the file holds something else.

    Example:
      >>> import json, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.jsonl"
      >>> tx.loggers.JSONL(path)(tx.loggers.Record("step", 1, 2, {"loss": 0.5}, 1.0, 64, 0.0))
      >>> json.loads(path.read_text())["metrics"]
      {'loss': 0.5}
    """

    def __init__(self, path: str | Path) -> None:
        self._rows = RowFile(path, _read_json_key)

    def __call__(self, record: Record) -> None:
        """Append the record."""
        key = record.kind, record.step
        if self._rows.takes(*key, begun=record.since[0]):
            self._rows.append(*key, json.dumps(_make_finite(asdict(record))) + "\n")


def _read_json_key(row: bytes) -> tuple[int, str]:
    found = json.loads(row)
    return int(found["step"]), str(found["kind"])


def _make_finite(value: Any) -> Any:
    """Return `value` with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _make_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_make_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class CSV:
    """Append each record as one row of a table to a file, flushed at once; for pandas and such.

    The columns are kind, step, seconds, examples and compile_seconds, then one for each metric,
    `a/b` for what is nested, `metrics/NAME` where a metric is called as one of the first five. A
    metric that comes later (those of an evaluation) adds a column: the
    file is written anew once, and the rows before have nothing there. A run that goes on does so
    in its file as with `JSONL`.

    Args:
      path: the file, "~" for the home; its folder is made if it is missing.

    Raises:
      OSError: the file cannot be written.
      ValueError: the file holds something else.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.csv"
      >>> log = tx.loggers.CSV(path)
      >>> log(tx.loggers.Record("step", 1, 1, {"loss": 0.5}, 1.0, 64, 0.0))
      >>> log(tx.loggers.Record("eval", 1, 1, {"accuracy": 0.75}, 1.0, 64, 0.0))
      >>> print(path.read_text())
      kind,step,seconds,examples,compile_seconds,loss,accuracy
      step,1,1.0,64,0.0,0.5,
      eval,1,1.0,64,0.0,,0.75
      <BLANKLINE>
    """

    _COLUMNS = ("kind", "step", "seconds", "examples", "compile_seconds")

    def __init__(self, path: str | Path) -> None:
        self._rows = RowFile(path, _read_csv_key, check_head=self._read_columns)

    def __call__(self, record: Record) -> None:
        """Append the record."""
        key = record.kind, record.step
        if not self._rows.takes(*key, begun=record.since[0]):
            return
        values = {
            f"metrics/{name}" if name in self._COLUMNS else printable(name): value
            for name, value in flatten_metrics(record.metrics).items()
        }
        own = {name: getattr(record, name) for name in self._COLUMNS}
        columns = self._read_columns(self._rows.head)
        named = values if columns else {**own, **values}
        more = [name for name in named if name not in columns]
        if more:
            columns += more
            self._rows.add_to_head(_write_row(columns).encode(), b"," * len(more))
        values |= own
        self._rows.append(*key, _write_row(values.get(name, "") for name in columns))

    def _read_columns(self, head: bytes) -> list[str]:
        columns = next(csv.reader([head.decode(errors="replace")]), [])
        if head and tuple(columns[: len(self._COLUMNS)]) != self._COLUMNS:
            raise ValueError(
                f"CSV needs a file whose columns begin with {', '.join(self._COLUMNS)}, got "
                f"{', '.join(columns)[:60]!r} in {self._rows.path}: give another path"
            )
        return columns


def _read_csv_key(row: bytes) -> tuple[int, str]:
    kind, step = row.decode().split(",")[:2]
    return int(step), kind


def _write_row(values: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def flatten_metrics(metrics: Metrics) -> dict[str, Any]:
    """Return each number of metrics by its path.

    Example:
      >>> from txcore.train.loggers import flatten_metrics
      >>> flatten_metrics({"loss": 0.5, "norm": {"w": [1.0, 2.0]}})
      {'loss': 0.5, 'norm/w/0': 1.0, 'norm/w/1': 2.0}
    """
    if all(isinstance(value, float) for value in metrics.values()):  # as most are
        return dict(metrics)
    return dict(zip(leaf_names(metrics), jax.tree.leaves(metrics), strict=True))


_PREFIXES = {"step": "train", "eval": "eval"}  # of TensorBoard's tags, by the record's kind


class TensorBoard:
    """Append each step and evaluation to an event file; TensorBoard need not be installed.

    The metrics of steps are `train/NAME`, those of evaluations `eval/NAME`, `a/b` for what is
    nested; `train/examples_per_second` is the mean so far, unless a metric has that name. A run
    that goes on writes another file in the same folder, and TensorBoard drops the steps that it
    makes again from the earlier ones.

    Args:
      folder: of the event files, one for each run, "~" for the home; it is made if it is missing.

    Raises:
      OSError: the file cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> tx.loggers.TensorBoard(folder)(
      ...     tx.loggers.Record("step", 1, 2, {"loss": 0.5}, 1.0, 64, 0.0))
      >>> [path.name[:20] for path in folder.iterdir()]
      ['events.out.tfevents.']
    """

    _numbers = itertools.count()  # in a process, of its files

    def __init__(self, folder: str | Path) -> None:
        from txcore.train.checkpoints.folder import absolute_path  # as in RowFile

        self._folder = absolute_path(folder)
        self._file: Path | None = None
        self._head = b""  # what the file begins with, until it is written
        self._size = 0  # of what was written whole
        self._newest = (0, "")

    def __call__(self, record: Record) -> None:
        """Append the record."""
        prefix, begun = _PREFIXES.get(record.kind), record.since[0]
        if prefix is None or record.step == begun:  # of a fit without a step, which told it before
            return
        key = record.step, record.kind
        if self._file is None or record.step < self._newest[0] or key == self._newest:
            self._begin_file(begun)
        scalars = {
            f"{prefix}/{name}": value
            for name, value in flatten_metrics(record.metrics).items()
            if isinstance(value, int | float)
        }
        if record.kind == "step":
            scalars.setdefault("train/examples_per_second", record.examples_per_second)
        self._append(event_file.encode_scalars(time.time(), record.step, scalars))
        self._newest = key

    def _begin_file(self, begun: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        before = [path.name.split(".") for path in self._folder.glob("events.out.tfevents.*")]
        # TensorBoard reads the files in the order of their names.
        newest = max((int(parts[3]) for parts in before if parts[3].isdecimal()), default=0)
        seconds = max(int(time.time()), newest + 1)
        host = socket.gethostname()
        name = f"events.out.tfevents.{seconds:010d}.{host}.{os.getpid()}.{next(self._numbers)}"
        self._head = event_file.encode_start(time.time(), begun + 1 if before else None)
        self._file, self._size = self._folder / name, 0

    def _append(self, event: bytes) -> None:
        assert self._file is not None
        with self._file.open("ab") as file:
            if file.tell() > self._size:  # a part, written when the disk was full
                file.truncate(self._size)
            file.write(self._head + event)
        self._size += len(self._head + event)
        self._head = b""
