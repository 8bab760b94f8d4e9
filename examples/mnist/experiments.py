"""Measure how the training scales: serial, then N processes and N devices, over the same work.

    python examples/mnist/experiments.py --process-counts 1 2 4 --epochs 1 --output-dir results

Writes a folder with a JSON file for each number of workers, the metrics and four pictures; what it
measures and how is in docs/experiments.md.
"""

import argparse
import datetime
import importlib.util
import json
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from data.dataset import NAMES
from models import MODELS
from scaling import advice, metrics
from scaling.cases import list_cases
from scaling.run import HERE, can_pin, environment, run_case, usable_cores

_TEXT = "Train serially, then in N processes and on N devices, and compare."


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=_TEXT)
    add = parser.add_argument
    add("--process-counts", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    add("--epochs", type=int, default=1)
    add("--batch-size", type=int, default=128, help="global; weak scaling: of each worker")
    add("--output-dir", type=pathlib.Path, default=pathlib.Path("results"))
    add("--model", default="cnn", choices=list(MODELS))
    add("--learning-rate", type=float, default=0.02, help="of sgd with momentum 0.9")
    add("--warmup", type=int, default=100, help="steps of linear warm-up")
    add("--seed", type=int, default=0)
    add("--dataset", default="auto", choices=NAMES)
    add("--data-dir", help="as for train.py")
    add("--train-size", type=int, help="train on the first N examples only")
    add("--carry-to", type=int, nargs="*", default=[8, 64, 512], help="ranks to compile for")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be run, before anything is."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the pictures need matplotlib, found none: install txcore[examples]")
    counts = args.process_counts
    for name, values in (
        ("process-counts", counts),
        ("carry-to", args.carry_to),
        ("epochs", [args.epochs]),
        ("batch-size", [args.batch_size]),
    ):
        if any(value < 1 for value in values):
            given = " ".join(map(str, values))
            raise ValueError(f"--{name} needs counts from 1 on, got {given}")
    if odd := [n for n in counts if args.batch_size % n]:
        raise ValueError(
            f"--batch-size {args.batch_size} cannot be shared equally by {odd[0]} workers: use a "
            f"multiple of {odd[0]}, or leave it out of --process-counts"
        )


def run_all(args: argparse.Namespace, options: dict[str, Any]) -> tuple[list[Any], Any]:
    """Run all cases, and compile for the ranks that are not here; return both results."""
    cores = usable_cores()
    cases = list_cases(args.process_counts, args.batch_size, len(cores), args.carry_to)
    own = f"{cases[0].cores_per_worker} core(s) each"
    print(f"{len(cases)} runs on {len(cores)} core(s), workers with {own}", flush=True)
    if not can_pin():
        print("this system does not pin processes to cores: they are where it puts them")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        carried = carry_on(args, options, pathlib.Path(folder))
        for case in cases:
            run = run_case(case, options, cores, pathlib.Path(folder))
            runs.append(run)
            print(describe_run(run), flush=True)
    return runs, carried


def describe_run(run: dict[str, Any]) -> str:
    """Return a line about a run."""
    text = f"{run['name']:<34} step {1e3 * run['step_seconds']:7.1f} ms"
    if run["trains"]:
        text += (
            f", input {1e3 * (run['input_seconds'] or 0):5.1f} ms, "
            f"{run['images_per_second']:7,.0f} images/s, {100 * run['test_accuracy']:.2f}%, "
            f"compiled in {run['compile_seconds']:.1f} s"
        )
    return text + (", OVERSUBSCRIBED" if run["oversubscribed"] else "")


def carry_on(args: argparse.Namespace, options: dict[str, Any], folder: pathlib.Path) -> Any:
    """Compile the step for more ranks, in a process that can simulate so many devices."""
    out, ranks = folder / "carried.json", sorted({*args.carry_to})
    asked = {**options, "batch_size": args.batch_size, "ranks": ranks, "out": str(out)}
    devices = {"JAX_NUM_CPU_DEVICES": str(max(ranks, default=1))}
    done = subprocess.run(
        [sys.executable, str(HERE / "carry.py"), json.dumps(asked)],
        env=environment() | devices | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"compiling for {ranks} ranks failed: {done.stderr[-2000:]}")
    carried = json.loads(out.read_text(encoding="utf-8"))
    left_out = {row["target"].rpartition(":")[0]: row for row in carried["predicted"]}
    for chip, row in left_out.items():
        if "left_out" in row:
            print(f"predictions for {chip} are left out: {row['left_out']}", flush=True)
    return carried


def write_json(path: pathlib.Path, found: Any) -> None:
    """Write a file of results."""
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_folder(folder: pathlib.Path, runs: list[Any], found: dict[str, Any]) -> None:
    """Write what was measured, one file for each number of workers, and the pictures."""
    from scaling import plots  # matplotlib

    folder.mkdir(parents=True)
    serial = [run for run in runs if run["workers"] == 1]
    write_json(folder / "serial_results.json", {run["name"]: run for run in serial})
    for n in sorted({run["workers"] for run in runs} - {1}):
        own = {run["name"]: run for run in runs if run["workers"] == n}
        write_json(folder / f"parallel_{n}p_results.json", own)
    write_json(folder / "performance_metrics.json", found)
    trained = [run for run in runs if run["trains"]]
    plots.draw_loss_curves(trained, folder / "loss_curves.png")
    plots.draw_speedup(found, folder / "speedup.png")
    plots.draw_efficiency(found, folder / "efficiency.png")
    plots.draw_comparison(trained, folder / "training_comparison.png")


def describe_metrics(found: dict[str, Any]) -> str:
    """Return the table of speedups, and what the runs advise."""
    lines = [f"{'run':<34} speedup expected efficiency expected"]
    for row in found["runs"]:
        values = [row.get("speedup"), row.get("expected_speedup")]
        values += [row.get("efficiency"), row.get("expected_efficiency")]
        if row["group"] != "serial":
            cells = ["" if value is None else f"{value:.2f}" for value in values]
            marks = " oversubscribed" if row["oversubscribed"] else ""
            lines.append(f"{row['name']:<34} {' '.join(cell.rjust(8) for cell in cells)}{marks}")
    return "\n".join([*lines, *found["advice"]])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; an error that the user can mend is one line."""
    args = parse(argv)
    names = ("model", "epochs", "learning_rate", "warmup", "seed", "dataset", "data_dir")
    options = {name: getattr(args, name) for name in (*names, "train_size")}
    options["base_batch"] = args.batch_size
    started = datetime.datetime.now()
    try:
        check(args)
        runs, carried = run_all(args, options)
        found = metrics.compare_runs(runs, carried, len(usable_cores()))
        found |= {"options": options, "machine": platform.platform(), "jax": runs[0]["jax"]}
        found["advice"] = advice.give_advice(found)
        folder = args.output_dir / f"experiment_{started:%Y%m%d_%H%M%S}"
        write_folder(folder, runs, found)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"experiments.py: {error}", file=sys.stderr)
        return 2
    print(describe_metrics(found))
    print(folder)
    return 0


if __name__ == "__main__":
    # By an exception the run under way is killed; the signal alone would leave it behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
