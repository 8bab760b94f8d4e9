"""The pictures of an experiment; matplotlib comes with the extra `examples`."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

COLORS = {"processes": "tab:blue", "devices": "tab:orange"}
MARKS = {"processes": "o", "devices": "s"}
PARTS = {"compile": "tab:gray", "steps": "tab:blue", "input": "tab:red"}
Rows = Sequence[Mapping[str, Any]]


def _save(figure: Any, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _smooth(losses: Sequence[float], window: int) -> np.ndarray:
    """Return means over so many steps, as long as the curve."""
    sums = np.cumsum(np.insert(np.asarray(losses, float), 0, 0.0))
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def draw_loss_curves(runs: Rows, path: pathlib.Path) -> None:
    """Draw the loss over the examples seen: one batch however shared, and larger batches."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    serial = next(run for run in runs if run["group"] == "serial")
    groups = {
        "strong": f"one batch of {serial['batch_size']}, shared",
        "weak": f"a batch of {serial['batch_size']} for each worker",
    }
    for panel, (group, title) in zip(panels, groups.items(), strict=True):
        several = [run for run in runs if run["group"] == group]
        for i, run in enumerate([serial, *several]):
            seen = np.arange(1, run["steps"] + 1) * run["batch_size"]
            curve = _smooth(run["loss_curve"], max(run["steps"] // 40, 1))
            # Curves that are equal up to rounding lie on each other: each is thinner than the last.
            width = 1 + 0.8 * (len(several) - i)
            style = "--" if run["rate_scaling"] == "linear" else "-"
            panel.plot(seen, curve, style, color=f"C{i}", linewidth=width, label=run["name"])
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("examples seen")
        panel.set_yscale("log")
        panel.grid(True, which="both", alpha=0.25)
        panel.legend(fontsize="small")
    panels[0].set_ylabel("training loss (mean over 1/40 of the run)")
    figure.suptitle("Training loss over the examples seen")
    _save(figure, path)


def _mark_oversubscribed(axes: Axes, rows: Rows, metrics: Mapping[str, Any]) -> None:
    """Shade the numbers of workers that have no cores of their own."""
    most = metrics["cores"] / metrics["cores_per_worker"]
    counts = sorted({1, *(row["workers"] for row in rows)})
    axes.set_xlim(min(counts) / 1.15, max(counts) * 1.15)
    if max(counts) > most:
        text = f"oversubscribed:\nmore workers than {_count(metrics['cores'], 'core')}"
        axes.axvspan(most * 1.1, max(counts) * 1.15, color="tab:gray", alpha=0.15, label=text)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("workers (processes, or devices of one process)")
    axes.grid(True, alpha=0.25)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _points(rows: Rows, way: str, group: str, key: str, one: float) -> tuple[list[int], list[Any]]:
    """Return (workers, value) of the runs of a way, from one worker on."""
    own = [
        row
        for row in rows
        if (row["way"], row["group"], row["rate_scaling"]) == (way, group, "none")
        and row.get(key) is not None
    ]
    return [1, *(row["workers"] for row in own)], [one, *(row[key] for row in own)]


def draw_speedup(metrics: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draw the speedup over the same work, measured and expected, and where it would go."""
    rows = metrics["runs"]
    figure, (here, far) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    _mark_oversubscribed(here, rows, metrics)
    counts = sorted({1, *(row["workers"] for row in rows)})
    here.plot(counts, counts, ":", color="black", label="ideal")
    for way, color in COLORS.items():
        here.plot(
            *_points(rows, way, "strong", "speedup", 1.0),
            MARKS[way] + "-",
            color=color,
            label=f"{way}, measured",
        )
        here.plot(
            *_points(rows, way, "strong", "expected_speedup", 1.0),
            MARKS[way] + "--",
            color=color,
            markerfacecolor="white",
            label=f"{way}, expected",
        )
    here.set_ylabel("speedup over one worker")
    here.set_ylim(bottom=0)
    here.legend(fontsize="small")
    here.set_title("here: the same batch and examples", fontsize="medium")
    _draw_far(far, metrics, "strong_speedup", "expected speedup")
    far.set_title("carried on: the same batch, while it can be shared", fontsize="medium")
    far.set_yscale("log", base=2)
    far.yaxis.set_major_formatter("{x:g}")
    figure.suptitle("Speedup over the same work, without compilation")
    _save(figure, path)


def draw_efficiency(metrics: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draw which share of n times one worker's pace n workers reach."""
    rows = metrics["runs"]
    figure, (here, far) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    _mark_oversubscribed(here, rows, metrics)
    here.axhline(1, linestyle=":", color="black", label="ideal")
    for way, color in COLORS.items():
        for group, line in (("strong", "-"), ("weak", "--")):
            what = "one batch" if group == "strong" else "a batch each"
            here.plot(
                *_points(rows, way, group, "efficiency", 1.0),
                MARKS[way] + line,
                color=color,
                label=f"{way}, {what}",
            )
    here.set_ylabel("efficiency (speedup / workers)")
    here.set_ylim(0, None)
    here.legend(fontsize="small")
    here.set_title("here, measured", fontsize="medium")
    _draw_far(far, metrics, "weak_efficiency", "expected efficiency")
    far.set_title("carried on: a batch for each rank", fontsize="medium")
    far.set_ylim(0, 1.1)
    figure.suptitle("Efficiency of strong and weak scaling")
    _save(figure, path)


def _draw_far(axes: Axes, metrics: Mapping[str, Any], key: str, label: str) -> None:
    """Draw what is expected of ranks that are not here: by this machine, and by data sheets."""
    model = metrics["model"]
    series = {"ranks as these, joined as these": model.get("carried", [])}
    for row in model["predicted_on_targets"]:
        if row["ranks"] > 1:
            name = f"{row['target'].rpartition(':')[0]}, at its data sheet's peaks"
            series.setdefault(name, []).append(row)
    left_out = []
    for i, (name, rows) in enumerate(series.items()):
        shown = [(row["ranks"], row[key]) for row in rows if row.get(key) is not None]
        if shown:
            axes.plot(*zip(*shown, strict=True), "o-", color=f"C{i + 2}", label=name)
        elif rows:
            left_out.append(f"{name.partition(',')[0]}: left out, no compiler here")
    for text in left_out:
        axes.plot([], [], " ", label=text)
    ranks = [row["ranks"] for rows in series.values() for row in rows]
    if ranks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({*ranks}), [str(n) for n in sorted({*ranks})])
        axes.minorticks_off()
        axes.set_xlim(min(ranks) / 1.3, max(ranks) * 1.3)
    axes.set_xlabel("ranks")
    axes.set_ylabel(label)
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize="small")


def draw_comparison(runs: Rows, path: pathlib.Path) -> None:
    """Draw each run's throughput, the parts of its time, and its accuracy."""
    height = 1.8 + 0.36 * len(runs)
    figure, panels = pyplot.subplots(1, 3, figsize=(13, height), layout="constrained", sharey=True)
    places = range(len(runs))
    names = [run["name"] + (" *" if run["oversubscribed"] else "") for run in runs]
    panels[0].barh(places, [run["images_per_second"] for run in runs], color="tab:blue")
    panels[0].set_xlabel("images per second, while training")
    starts = np.zeros(len(runs))
    for part, color in PARTS.items():
        seconds = np.array([_seconds_of(run)[part] for run in runs])
        panels[1].barh(places, seconds, left=starts, color=color, label=part)
        starts += seconds
    panels[1].set_xlabel("seconds of the whole run")
    panels[1].set_xlim(0, 1.02 * max(starts))
    panels[1].legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    accuracies = [100 * run["test_accuracy"] for run in runs]
    panels[2].plot(accuracies, places, "o", color="tab:green")
    room = max(0.15 * (max(accuracies) - min(accuracies)), 0.05)
    panels[2].set_xlim(min(accuracies) - room, max(accuracies) + 3 * room)
    for place, accuracy in zip(places, accuracies, strict=True):
        panels[2].annotate(
            f"{accuracy:.2f}", (accuracy, place), (6, 0), textcoords="offset points", va="center"
        )
    panels[2].set_xlabel("test accuracy, %")
    panels[0].set_yticks(places, names)
    panels[0].invert_yaxis()
    for panel in panels:
        panel.grid(True, axis="x", alpha=0.25)
    marked = any(run["oversubscribed"] for run in runs)
    title = "Training, run by run" + (" (* more workers than cores)" if marked else "")
    figure.suptitle(title)
    _save(figure, path)


def _seconds_of(run: Mapping[str, Any]) -> dict[str, float]:
    """Return where the seconds of a run went: what is no input is the steps'."""
    share = min((run["input_seconds"] or 0.0) * run["steps"], run["train_seconds"])
    return {
        "compile": run["compile_seconds"],
        "steps": run["train_seconds"] - share,
        "input": share,
    }
