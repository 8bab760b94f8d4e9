"""Loggers: functions of a record. An engine calls them on rank 0 alone."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from txcore.kernels.common.checks import whole_number

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

    Args:
      path: the file, "~" for the home; its folder is made if it is missing.

    Raises:
      OSError: the file cannot be written.

    Example:
      >>> import json, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.jsonl"
      >>> tx.loggers.JSONL(path)(tx.loggers.Record("step", 1, 2, {"loss": 0.5}, 1.0, 64, 0.0))
      >>> json.loads(path.read_text())["metrics"]
      {'loss': 0.5}
    """

    def __init__(self, path: str | Path) -> None:
        from txcore.train.checkpoints.folder import absolute_path  # most runs write no such file

        self._path = absolute_path(path)

    def __call__(self, record: Record) -> None:
        """Append the record."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_make_finite(asdict(record))) + "\n")


def _make_finite(value: Any) -> Any:
    """Return `value` with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _make_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_make_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
