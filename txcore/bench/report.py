"""Write measurements as nccl-tests' table, as JSON, as CSV and as a plot."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from txcore.bench.measure import Row, Setup
from txcore.bench.operations import Operation
from txcore.outside import replace_text
from txcore.version import VERSION

_HEAD = ("size", "count", "type", "time(us)", "min(us)", "spread", "algbw", "busbw", "wrong")
_WIDTHS = (12, 12, 9, 11, 11, 7, 8, 8, 7)
_COLUMNS = (
    *(
        "operation",
        "algorithm",
        "dtype",
        "size_bytes",
        "count",
        "seconds",
        "least_seconds",
        "spread",
    ),
    *("algorithm_bandwidth", "bus_bandwidth", "wrong"),
)


def describe_run(setup: Setup, machine: str) -> dict[str, Any]:
    """Describe what the figures of a run depend on."""
    return {
        "txcore": VERSION,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "machine": machine,
        "processes": jax.process_count(),
        "mesh": dict(setup.mesh.shape),
        "axes": list(setup.axes),
        "group_size": setup.group_size,
        "groups": setup.groups,
        "warmup": setup.warmup,
        "iterations": setup.iterations,
        "in_place": setup.in_place,
    }


def format_run(run: Mapping[str, Any]) -> str:
    """Format the lines above the tables: versions, machine, mesh.

    Example:
      >>> from txcore.bench import report
      >>> run = {"txcore": "0.1", "jax": "0.12.0", "platform": "cpu", "machine": "a CPU, 2 cores",
      ...        "processes": 2, "mesh": {"data": 2}, "warmup": 5, "iterations": 20}
      >>> print(report.format_run(run))
      # txcore 0.1, jax 0.12.0, cpu: a CPU, 2 cores
      # 2 process(es), mesh data=2, 5 calls to warm up, 20 timed
    """
    mesh = ",".join(f"{axis}={size}" for axis, size in run["mesh"].items())
    return (
        f"# txcore {run['txcore']}, jax {run['jax']}, {run['platform']}: {run['machine']}\n"
        f"# {run['processes']} process(es), mesh {mesh}, {run['warmup']} calls to warm up, "
        f"{run['iterations']} timed"
    )


def _format_title(name: str, algorithm: str) -> str:
    return f"{name} by {algorithm}" if algorithm else name


def format_head(operation: Operation, setup: Setup) -> str:
    """Format the head of one collective's table."""
    title = _format_title(operation.name, operation.algorithm)
    where = f"over {','.join(setup.axes)}: {setup.groups} group(s) of {setup.group_size} devices"
    place = "in place where it can be" if setup.in_place else "out of place"
    lines = [f"# {title} {where}, {place}; bandwidths in GB/s", _format_cells(_HEAD)]
    if operation.simulated:
        lines.insert(1, "# simulated TPUs: what is wrong counts, the times are the simulator's")
    return "\n".join(lines)


def format_row(row: Row) -> str:
    """Format a row of the table; bandwidths are in GB/s, 10^9 bytes."""
    return _format_cells(
        (
            *(str(row.size_bytes), str(row.count), row.dtype),
            *(f"{row.seconds * 1e6:.1f}", f"{row.least_seconds * 1e6:.1f}", f"{row.spread:.0%}"),
            *(f"{row.algorithm_bandwidth / 1e9:.2f}", f"{row.bus_bandwidth / 1e9:.2f}"),
            str(row.wrong),
        )
    )


def _format_cells(cells: Iterable[str]) -> str:
    return " ".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))


def write_json(path: str | os.PathLike[str], run: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write the run and every row, with the median of each rank.

    Raises:
      OSError: it cannot be written.
    """
    content = {**run, "rows": [dataclasses.asdict(row) for row in rows]}
    replace_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Write a line for each row, in seconds and bytes per second.

    Raises:
      OSError: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([getattr(row, column) for column in _COLUMNS] for row in rows)
    replace_text(path, text.getvalue())


def plot_bandwidth(path: str | os.PathLike[str], title: str, rows: Sequence[Row]) -> None:
    """Plot bus bandwidth over size, a line for each collective and dtype.

    Raises:
      ImportError: matplotlib is not installed.
      OSError, ValueError: it cannot be written, or not in the format that the name asks for.
    """
    from matplotlib.figure import Figure

    lines: dict[str, list[Row]] = {}
    for row in rows:
        name = f"{_format_title(row.operation, row.algorithm)} {row.dtype}"
        lines.setdefault(name, []).append(row)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines.items():
        sizes = [row.size_bytes / 2**20 for row in points]
        axes.plot(sizes, [row.bus_bandwidth / 1e9 for row in points], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("size in MiB")
    axes.set_ylabel("bus bandwidth in GB/s")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
