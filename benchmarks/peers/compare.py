"""Compare txcore's training step with its peers on two cores.

    make bench-peers BENCH_ARGS="--rounds 5 --cores 0,1"
    make bench-peers BENCH_ARGS="--to-accuracy 99"

Without --to-accuracy: images per second of `cnn3x3` without dropout. With it: seconds from the
start of the processes to that test accuracy on MNIST. README.md beside this file says how each
peer is run.
"""

import argparse
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import accuracy
import pool
import report
import throughput

BATCH = 64  # in each worker
WORKERS = 2
BATCHES = 100  # held in memory by every worker, gone through again and again
RESULTS = pool.HERE.parent / "results"
# The options of either mode alone, and their defaults.
RATE: dict[str, Any] = {"rounds": 5, "steps": 50, "dataset": "mnist", "slower": False}
REACH: dict[str, Any] = {
    "seeds": 5,
    "learning_rate": 0.14,
    "warmup": 150,
    "label_smoothing": 0.05,
    "epochs": 1,
    "max_epochs": 10,
}
OURS = ("txcore (2 devices)", "txcore (2 processes)")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and refuse what cannot be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peers-python", help="interpreter of the peers' environment; default: none, no peers")
    add("--cores", default="0,1", help="two, separated by a comma; default: 0,1")
    add("--only", help="run those whose name contains one of these words, separated by commas")
    add("--to-accuracy", type=float, metavar="PERCENT", help="measure the time to it instead")
    add("--name", help="of the files under benchmarks/results; default: throughput or accuracy")
    rate = parser.add_argument_group("images per second")
    rate.add_argument("--rounds", type=int, help="default: 5")
    rate.add_argument("--steps", type=int, help="timed in each round; default: 50")
    rate.add_argument("--dataset", choices=["mnist", "synthetic"], help="default: mnist")
    rate.add_argument("--slower", action="store_true", default=None, help="also slower forms")
    reach = parser.add_argument_group("time to an accuracy")
    reach.add_argument("--seeds", type=int, help="default: 5")
    reach.add_argument("--learning-rate", type=float, help="of txcore's recipe; default: 0.14")
    reach.add_argument("--warmup", type=int, help="steps of it; default: 150")
    reach.add_argument("--label-smoothing", type=float, help="of its labels; default: 0.05")
    reach.add_argument("--epochs", type=int, help="over which the rate falls to 0; default: 1")
    reach.add_argument("--max-epochs", type=int, help="of DDP's own recipe; default: 10")
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be run; put in the cores as numbers, and the defaults of the mode."""
    args.cores = parse_cores(args.cores)
    if args.to_accuracy is None:
        used, unused, needed, advice = RATE, REACH, "--to-accuracy", "add it, as --to-accuracy 99"
    else:
        used, unused, needed, advice = REACH, RATE, "no --to-accuracy", "leave one of them out"
    for name in unused:
        if getattr(args, name) is not None:
            raise ValueError(f"{name_flag(name)}: required {needed}; {advice}")
    for name, default in used.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        value = getattr(args, name)
        if type(default) is int and value < 1:
            raise ValueError(f"{name_flag(name)}: required at least 1, given {value}")
    if args.to_accuracy is not None and not 0 < args.to_accuracy <= 100:
        raise ValueError(
            f"--to-accuracy: required a percentage above 0, given {args.to_accuracy}; try 99"
        )


def name_flag(name: str) -> str:
    """Return an option as it is written."""
    return f"--{name.replace('_', '-')}"


def parse_cores(text: str) -> list[int]:
    """Return the cores that "0,1" names.

    Raises:
      ValueError: they are not two different ones on which this process may run.
    """
    allowed = sorted(os.sched_getaffinity(0))
    cores = [int(core) for core in text.split(",") if core.strip().isdecimal()]
    if len(cores) != WORKERS or len(set(cores)) != WORKERS or not set(cores) <= set(allowed):
        raise ValueError(
            f"--cores: required {WORKERS} different ones of {allowed}, given {text}; name two of "
            f"them, as --cores {','.join(map(str, allowed[:WORKERS]))}"
        )
    return cores


def choose_contenders(args: argparse.Namespace, everything: Sequence[Any]) -> list[Any]:
    """Return what can run here of those asked for.

    Raises:
      ValueError: nothing is left.
    """
    words = args.only.split(",") if args.only else [""]
    asked = [x for x in everything if any(word.lower() in x.name.lower() for word in words)]
    left = [x for x in asked if x.own or args.peers_python]
    if not left:
        names = "; ".join(x.name for x in everything)
        raise ValueError(
            f"nothing to run with --only {args.only!r} and --peers-python {args.peers_python!r}: "
            f"required one of {names}, and an interpreter for those of other frameworks"
        )
    return left


def find_pythons(args: argparse.Namespace) -> dict[bool, str]:
    """Return the interpreters: of our environment (True) and the peers' (False)."""
    return {True: sys.executable, False: args.peers_python or ""}


def run_throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Measure images per second, write the plot, print the table; return the results."""
    contenders = choose_contenders(args, pool.CONTENDERS + (pool.SLOWER if args.slower else ()))
    with tempfile.TemporaryDirectory() as folder:
        files = write_inputs(args, pathlib.Path(folder))
        with pool.launch_command(contenders, find_pythons(args), args.cores, files) as running:
            losses = {}
            for each in running:
                name = each.contender.name
                losses[name] = each.run(throughput.AGREE_STEPS)[1]
                print_line(f"{name}: first losses {_format_numbers(losses[name])}")
            precisions = {each.name: each.precision for each in contenders}
            deviations = throughput.check_agreement(losses, precisions)
            versions = {each.contender.name: each.versions for each in running}
            rates = throughput.measure_throughput(
                running,
                rounds=args.rounds,
                steps=args.steps,
                batch=BATCH * WORKERS,
                seed=0,
                say=print_line,
            )
    ratios = throughput.list_ratios(rates, OURS)
    print(report.throughput_table(rates, ratios))
    report.plot_results(
        results_path(args, "png"),
        rates,
        "images per second: median, and each round",
        f"cnn3x3, batch {BATCH} in each of {WORKERS} workers, a core each",
    )
    return {
        "model": "cnn3x3 without dropout",
        "batch_per_worker": BATCH,
        "dataset": args.dataset,
        "steps_per_round": args.steps,
        "versions": versions,
        "first_losses": losses,
        "largest_relative_deviation": deviations,
        "images_per_second": rates,
        "ratios": {
            own: {other: dataclasses.asdict(ratio) for other, ratio in each.items()}
            for own, each in ratios.items()
        },
    }


def write_inputs(args: argparse.Namespace, folder: pathlib.Path) -> list[str]:
    """Write the batches and the initial weights; return the workers' flags that name them."""
    files = [f"--data={folder / 'data.npz'}", f"--weights={folder / 'weights.npz'}"]
    flags = [f"--dataset={args.dataset}", f"--batch={BATCH * WORKERS}", f"--count={BATCHES}"]
    command = [sys.executable, str(pool.HERE / "inputs.py"), *files, *flags]
    done = subprocess.run(
        command,
        env=pool.worker_environment(1),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise pool.PeerError(f"no inputs: {reason}; or run with --dataset synthetic")
    return files


def run_to_accuracy(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the time to an accuracy, write the plot, print the table; return the results."""
    recipe = accuracy.Recipe(args.learning_rate, args.warmup, args.label_smoothing, args.epochs)
    trainers = choose_contenders(args, accuracy.list_trainers(recipe, args.max_epochs))
    accuracy.load_data(sys.executable)
    runs = accuracy.measure_accuracy(
        trainers,
        seeds=args.seeds,
        say=print_line,
        goal=args.to_accuracy / 100,
        pythons=find_pythons(args),
        cores=args.cores,
    )
    print(report.accuracy_table(runs, OURS))
    reached = {
        name: [run.seconds for run in each if run.seconds is not None]
        for name, each in runs.items()
    }
    report.plot_results(
        results_path(args, "png"),
        {name: seconds for name, seconds in reached.items() if seconds},
        f"seconds to {args.to_accuracy:g}% test accuracy: median, and each seed that got there",
        f"cnn3x3 on MNIST, batch {BATCH} in each of {WORKERS} workers, a core each",
    )
    return {
        "model": "cnn3x3 without dropout",
        "batch_per_worker": BATCH,
        "goal_percent": args.to_accuracy,
        "recipe": dataclasses.asdict(recipe),
        "max_epochs_of_ddps_own_recipe": args.max_epochs,
        "runs": {name: [dataclasses.asdict(run) for run in each] for name, each in runs.items()},
    }


def print_line(text: str) -> None:
    """Tell how far it is, on standard error: the table alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def _format_numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def results_path(args: argparse.Namespace, suffix: str) -> pathlib.Path:
    """Return the path of one of the files to write."""
    name = args.name or ("throughput" if args.to_accuracy is None else "accuracy")
    return RESULTS / f"peers_{name}.{suffix}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; an error that the user can mend is a few lines."""
    args = parse_arguments(argv)
    try:
        machine = report.describe_machine(args.cores)
        results = run_throughput(args) if args.to_accuracy is None else run_to_accuracy(args)
        report.write_json(results_path(args, "json"), {"machine": machine} | results)
    except (pool.PeerError, ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    print_line(f"written: {results_path(args, 'json')} and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
