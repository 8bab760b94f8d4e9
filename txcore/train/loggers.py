"""Loggers: functions of a record. An engine calls them on rank 0 alone."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What happened: a step, an evaluation, or the end of `fit`."""

    kind: str  # "step", "eval" or "end"
    step: int  # completed steps of this run of fit
    total_steps: int | None  # None where the data's length is unknown
    metrics: Metrics  # Python floats, or lists for arrays
    seconds: float  # of training so far; compilation and evaluation left out
    step_ms: float  # of this step; at the end, the mean
    examples_per_second: float  # since the record before; at the end, of the whole run
    compile_seconds: float  # of the engine so far

    @property
    def eta_s(self) -> float | None:
        """Seconds to go, at the mean pace so far."""
        if self.total_steps is None or self.step == 0:
            return None
        return self.seconds / self.step * (self.total_steps - self.step)


Logger = Callable[[Record], None]


class Basic:
    """Print one aligned line every `every` steps; on a terminal, a line in place with a bar.

    Args:
      every: steps from one line to the next.
      unit: what an example is called.
      stream: where to print; by default standard output.

    Raises:
      ValueError: `every` is not positive.

    Example:
      >>> log = tx.loggers.Basic()
      >>> log(tx.loggers.Record("step", 100, 400, {"loss": 0.25}, 2.0, 20.0, 6400.0, 1.0))
      step   100/400   25.0%  loss 0.2500    20.0 ms    6,400 examples/s  ETA 0:06
    """

    def __init__(
        self, every: int = 100, *, unit: str = "examples", stream: TextIO | None = None
    ) -> None:
        if every < 1:
            raise ValueError(f"Basic needs every= at least 1, got {every}")
        self._every, self._unit, self._stream = every, unit, stream

    def __call__(self, record: Record) -> None:
        """Print the record if it is due."""
        stream = self._stream or sys.stdout
        terminal = stream.isatty()
        last = record.step == record.total_steps
        due = record.kind != "step" or last or record.step == 1 or record.step % self._every == 0
        if not due and not terminal:
            return
        if terminal:
            stream.write("\r\033[K")
        text = format_line(record, self._unit)
        stream.write(text if due else f"{_bar(record)}{text}")
        stream.write("\n" if due else "")
        stream.flush()


def _bar(record: Record, width: int = 20) -> str:
    if record.total_steps is None:
        return ""
    filled = width * record.step // max(record.total_steps, 1)
    return f"[{'#' * filled}{'.' * (width - filled)}] "


def format_line(record: Record, unit: str = "examples") -> str:
    """Return the record as one aligned line."""
    total = f"/{record.total_steps}" if record.total_steps is not None else ""
    parts = [f"{record.kind:<4} {record.step:>5}{total}"]
    if record.total_steps:
        parts.append(f"{100 * record.step / record.total_steps:5.1f}%")
    parts += [f"{key} {_number(value)}" for key, value in record.metrics.items()]
    if record.kind != "eval":
        parts.append(f"{record.step_ms:6.1f} ms {record.examples_per_second:8,.0f} {unit}/s")
    if record.kind == "step" and record.eta_s is not None:
        parts.append(f"ETA {int(record.eta_s) // 60}:{int(record.eta_s) % 60:02d}")
    if record.kind == "end":
        parts.append(f"{record.seconds:.1f} s, and {record.compile_seconds:.1f} s to compile")
    return "  ".join(parts)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


class JSONL:
    """Append each record as one line of JSON to a file, flushed at once.

    Args:
      path: the file; its folder is made if it is missing.

    Raises:
      OSError: the file cannot be written.

    Example:
      >>> import json, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.jsonl"
      >>> tx.loggers.JSONL(path)(tx.loggers.Record("step", 1, 2, {"loss": 0.5}, 1., 1., 64., 0.))
      >>> json.loads(path.read_text())["metrics"]
      {'loss': 0.5}
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def __call__(self, record: Record) -> None:
        """Append the record."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
