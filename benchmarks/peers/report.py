"""What is written down: the machine, a JSON file, a Markdown table and a plot."""

import datetime
import json
import math
import os
import pathlib
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def describe_machine(cores: Sequence[int]) -> dict[str, Any]:
    """Return what the figures stand for: the processor, the cores used, the date."""
    return {
        "cpu": _cpu_name(),
        "cores_of_machine": os.cpu_count(),
        "cores_used": list(cores),
        "load_average_at_start": os.getloadavg()[0],
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    """Return the processor's name, with the numbers of family and model where Linux says them."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in fields.items()}
    family, model = facts.get("cpu family", "?"), facts.get("model", "?")
    return f"{facts.get('model name', platform.machine())} (family {family}, model {model})"


def write_json(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Write the results, the folder too where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def format_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def throughput_table(
    rates: Mapping[str, Sequence[float]], ratios: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return the table: images per second of each, and how many times as fast ours are.

    Args:
      rates: images per second of each contender in each round.
      ratios: as throughput.list_ratios returns them.

    Returns:
      Medians over the rounds, with the least and the most.
    """
    header = ["", "images/s", *(f"{own} / this" for own in ratios)]
    rows = []
    for name, each in rates.items():
        row = [name, _format_spread(each, "{:,.0f}")]
        for own in ratios.values():
            ratio = own.get(name)
            row.append(f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else "")
        rows.append(row)
    return format_markdown(header, rows)


def accuracy_table(runs: Mapping[str, Sequence[Any]], ours: Sequence[str]) -> str:
    """Return the table: seconds to the goal, epochs, and which share of each ours take.

    Args:
      runs: accuracy.Run for each seed of each contender.
      ours: names of contenders to compare with all.

    Returns:
      Medians over the seeds; a run that did not reach the goal counts as infinitely long.
    """
    present = [own for own in ours if own in runs]
    header = ["", "seconds", "epochs", "seeds there", *(f"{own} / this" for own in present)]
    rows = []
    for name, each in runs.items():
        seconds = _median_seconds(each)
        epochs = statistics.median(len(run.accuracies) for run in each)
        there = sum(run.seconds is not None for run in each)
        row = [name, _format_seconds(seconds), f"{epochs:g}", f"{there} of {len(each)}"]
        for own in present:
            share = _median_seconds(runs[own]) / seconds
            row.append(f"{share:.2f}" if math.isfinite(share) and share > 0 else "")
        rows.append(row)
    return format_markdown(header, rows)


def _median_seconds(runs: Sequence[Any]) -> float:
    return statistics.median(math.inf if run.seconds is None else run.seconds for run in runs)


def _format_seconds(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "not reached"


def _format_spread(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return f"{form.format(statistics.median(values))} ({low} to {high})"


def plot_results(
    path: pathlib.Path, values: Mapping[str, Sequence[float]], label: str, title: str
) -> None:
    """Draw a bar for each contender's median and a dot for each of its measurements.

    Args:
      path: of the PNG file.
      values: measurements of each contender, at least one each.
      label: what they are, with the unit.
      title: of the plot.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.4 * len(values)), layout="constrained")
    for row, (name, each) in enumerate(values.items()):
        colour = "tab:blue" if name.startswith("txcore") else "tab:gray"
        axes.barh(row, statistics.median(each), color=colour, alpha=0.6)
        axes.plot(each, [row] * len(each), "k.", markersize=4)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_title(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
