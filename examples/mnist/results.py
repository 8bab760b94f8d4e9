"""What a run of the example leaves behind: the records that --results writes."""

import json
import os
import pathlib
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # jax would start before the clock
    import txcore as tx

STARTED = time.perf_counter()


class History:
    """A logger that keeps what --results writes."""

    def __init__(self) -> None:
        self.loss_curve: list[float] = []
        self.first_step: int | None = None  # of the curve; later than 1 where the run was resumed
        self.test_accuracy: float | None = None
        self.seconds_to_99: float | None = None
        self.end: tx.loggers.Record | None = None

    def __call__(self, record: "tx.loggers.Record") -> None:
        """Keep a record."""
        match record.kind:
            case "step":
                self.first_step = self.first_step or record.step
                self.loss_curve.append(record.metrics["loss"])
            case "eval":
                self.test_accuracy = record.metrics["test_accuracy"]
                if self.seconds_to_99 is None and record.metrics["test_accuracy"] >= 0.99:
                    self.seconds_to_99 = seconds_since_start()
            case "end":
                self.end = record


def seconds_since_start() -> float:
    """Return this process's age; where the system does not tell it, the script's."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        return uptime - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - STARTED


def write(path: str | None, history: History, report: Any) -> None:
    """Write a run's results as JSON.

    Args:
      path: the file, or None not to write.
      history: a logger of the whole run.
      report: the audit's, or None where there was none.
    """
    if path is None:
        return
    end = history.end
    results = {
        "test_accuracy": history.test_accuracy,
        "loss_curve": history.loss_curve,
        "first_step": history.first_step,
        "images_per_second": end.examples_per_second if end else None,
        "compile_seconds": end.compile_seconds if end else None,
        "seconds_to_99": history.seconds_to_99,
        "audit_ok": report.ok if report is not None else None,
        "collectives": report.to_dict()["collectives"] if report is not None else None,
    }
    text = json.dumps(results, indent=1) + "\n"
    pathlib.Path(path).write_text(text, encoding="utf-8")
