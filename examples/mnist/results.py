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
        self.accuracies: list[tuple[int, float]] = []  # with the steps after which they were
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
                self.accuracies.append((record.step, record.metrics["test_accuracy"]))
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


def draw(path: str | None, history: History, title: str) -> None:
    """Draw a run's loss and test accuracy.

    Args:
      path: the file, whose name ends in .png or .svg, or None not to draw.
      history: a logger of the whole run.
      title: above the picture.
    """
    if path is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, losses = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    first = history.first_step or 1
    steps = range(first, first + len(history.loss_curve))
    losses.plot(steps, history.loss_curve, color="tab:blue", linewidth=1, label="training loss")
    losses.set_xlabel("step")
    losses.set_ylabel("training loss")
    losses.set_ylim(bottom=0)
    losses.grid(True, alpha=0.25)
    lines = list(losses.get_lines())
    if history.accuracies:
        accuracy = losses.twinx()
        at, values = zip(*history.accuracies, strict=True)
        percent = [100 * value for value in values]
        lines += accuracy.plot(at, percent, "o-", color="tab:green", label="test accuracy")
        accuracy.set_ylabel("test accuracy, %")
    losses.legend(handles=lines, loc="center right")
    losses.set_title(title, fontsize="medium")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
