"""The flags of train.py: what they are, what they refuse, and what they stand for."""

import argparse
import importlib.util
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import models
from data.dataset import NAMES
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore import launch
from txcore.launch import watch
from txcore.parallel.gradients import algorithms
from txcore.train.numerics import nonfinite

AXES = ("data", "model")
BASE_BATCH = 64  # the batch to which --lr-scaling linear refers
ALGORITHMS = get_args(algorithms.Name)
EPOCHS = {"mnist": 3, "digits": 20}
LEARNING_RATES = {"sgd": 0.02, "adamw": 1e-3}
LOGGERS: dict[str, tuple[Callable[[pathlib.Path], tx.loggers.Logger], str]] = {
    "jsonl": (tx.loggers.JSONL, "train.jsonl"),
    "csv": (tx.loggers.CSV, "train.csv"),
    "tensorboard": (tx.loggers.TensorBoard, "tensorboard"),
}
_TEXT = "Train on MNIST, and prove which collectives the compiled step contains."


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=_TEXT)
    add = parser.add_argument
    add("--model", default="cnn", choices=list(models.MODELS))
    add("--dropout", type=float, help="replaces the model's dropout rates; 0 leaves them out")
    add("--devices", default="all", help="1, N or all; simulates CPU devices where needed")
    add("--mesh", help="axes and their sizes: data=2,model=2; default: all devices along data")
    add("--batch-size", type=int, default=128, help="of the global batch")
    add("--learning-rate", type=float, help="default: 0.02 for sgd, 0.001 for adamw; --delay: half")
    add("--optimizer", default="sgd", choices=list(LEARNING_RATES), help="sgd has momentum 0.9")
    add("--lr-scaling", default="none", choices=["none", "linear"], help="rate x batch / 64")
    add("--warmup", type=int, default=100, help="steps of linear warm-up; default: 100")
    add("--decay", default="none", choices=["none", "cosine"], help="cosine: to 0 at the end")
    add("--label-smoothing", type=float, default=0.0, help="from 0 to 1; default: 0")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int)
    length.add_argument("--epochs", type=int, help="default: 3 of MNIST, 20 of the few digits")
    add("--accumulate", type=int, help="microbatches of a step, added up before the exchange")
    add("--shard", choices=["optimizer", "gradients", "parameters"], help="what devices split")
    add("--compress", help="bf16, fp16, int8, powersgd, powersgd:RANK, top_k or top_k:FRACTION")
    add("--algorithm", choices=ALGORITHMS, help="of the gradients' exchange")
    add("--bucket-mb", type=float, help="MiB of the pieces in which gradients are exchanged")
    add("--sync-every", type=int, default=1, help="steps between averages of the parameters")
    add("--outer", default="none", choices=["none", "nesterov"], help="DiLoCo, with --sync-every")
    add("--delay", type=int, default=0, help="1: update by the gradients of the step before")
    add("--reduction", default="mean", choices=["mean", "adasum"], help="of the gradients")
    add("--eval-every", type=int, help="steps between evaluations; default: an epoch")
    add("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--seed", type=int, default=0)
    add("--dataset", default="auto", choices=NAMES)
    add(
        "--data-dir",
        help="folder of the MNIST files, or mnist.npz; default: TXCORE_DATA, or data/mnist",
    )
    add("--train-size", type=int, help="train on the first N examples only")
    add("--log-dir", help="write DIR/train.jsonl, or what --log-formats names")
    add("--log-formats", nargs="+", choices=list(LOGGERS), help="default: jsonl")
    add("--results", help="write a JSON file")
    add("--plot", help="draw loss and test accuracy into this PNG or SVG file at the end")
    add("--checkpoint-dir", help="save the run there, and resume it from there")
    add("--save-every", type=int, help="steps between checkpoints; default: 100")
    add("--keep", type=int, help="how many checkpoints to keep; default: 3")
    add("--resume", choices=["auto", "never", "must"], help="default: auto")
    add("--on-nonfinite", default="stop", choices=["stop", "skip", "ignore"], help="a NaN loss")
    add("--audit", default=True, action=argparse.BooleanOptionalAction)
    add("--coordinator", help="host:port of process 0, for processes started by hand")
    add("--num-processes", type=int)
    add("--process-id", type=int)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what is out of range before anything is loaded, and expand ~ in paths."""
    for name, low in (
        ("steps", 0),
        ("epochs", 0),
        ("warmup", 0),
        ("eval_every", 1),
        ("accumulate", 1),
    ):
        value = getattr(args, name)
        if value is not None and value < low:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} needs a count from {low} on, got {value}")
    if args.learning_rate is not None and not args.learning_rate >= 0:
        raise ValueError(f"--learning-rate needs a number from 0 on, got {args.learning_rate}")
    if not 0 <= args.label_smoothing <= 1:
        raise ValueError(
            f"--label-smoothing needs a number from 0 to 1, got {args.label_smoothing}"
        )
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed needs a number from 0 to {2**32 - 1}, got {args.seed}")
    for name in ("data_dir", "log_dir", "results", "plot", "checkpoint_dir"):
        path = os.path.expanduser(getattr(args, name) or "")  # shells leave --results=~/x as it is
        if path.startswith("~"):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} needs a path, but {path!r} is no user's here: write it out")
        setattr(args, name, path or None)
    if args.data_dir and args.dataset == "digits":
        raise ValueError(
            "--data-dir is for MNIST, but --dataset digits takes scikit-learn's: leave one out"
        )
    if args.log_formats and not args.log_dir:
        raise ValueError("--log-formats needs --log-dir: without it nothing is logged")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, found none: install txcore[examples]")
    if args.plot and pathlib.Path(args.plot).suffix not in (".png", ".svg"):
        raise ValueError(f"--plot needs a file that ends in .png or .svg, got {args.plot!r}")
    for written in filter(None, (args.results, args.plot)):
        # Now, and not after an hour of training.
        pathlib.Path(written).parent.mkdir(parents=True, exist_ok=True)


def choose_mesh(args: argparse.Namespace, num_processes: int) -> tx.MeshSpec:
    """Return the mesh: data parallelism over "data", tensor parallelism over "model"."""
    if args.mesh is None:
        devices = choose_devices(args.devices, num_processes)
        return tx.MeshSpec(devices, axes=("data",))
    sizes = parse_mesh(args.mesh)
    count = sizes["data"] * sizes["model"]
    if args.devices not in ("all", str(count)):
        raise ValueError(
            f"--mesh {args.mesh} needs {count} devices, got --devices {args.devices}: leave one out"
        )
    if sizes["data"] % num_processes:
        raise ValueError(
            f"--mesh {args.mesh}: {num_processes} processes share the batch over data, which needs "
            f"a multiple of {num_processes}"
        )
    return tx.MeshSpec(choose_devices(str(count), num_processes), AXES, tuple(sizes.values()))


def parse_mesh(text: str) -> dict[str, int]:
    """Return the size of each axis that --mesh names.

    Example:
      >>> parse_mesh("model=2")
      {'data': 1, 'model': 2}
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis == "pipe":
            raise ValueError(
                f"--mesh {text}: a pipeline needs layers that are alike, to be stacked and shared "
                "out, and these models have none. See examples/pipeline_two_stage.py and "
                "examples/gpt_small"
            )
        if axis not in AXES or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"--mesh needs sizes of the axes {' and '.join(AXES)}, as data=2,model=2, got "
                f"{text!r}"
            )
        sizes[axis] = int(size)
    return sizes


def make_plan(
    args: argparse.Namespace,
    layers: tuple[models.Layer, ...],
    mesh: tx.MeshSpec,
    batch: Mapping[str, P],
) -> tx.Plan:
    """Return what is parallel: the batch, and over several devices along "model" the layers."""
    splits = mesh.shape.get("model", 1) > 1
    tensor = tx.TP("model", rules=models.split_rules(layers)) if splits else None
    return tx.Plan(data_parallel=make_data_parallel(args), tensor_parallel=tensor, batch=batch)


def choose_devices(wanted: str, num_processes: int) -> list[Any]:
    """Return the devices to train on; simulate CPU devices where there are fewer real ones."""
    if wanted == "all":
        return jax.devices()
    if not wanted.isdigit() or int(wanted) < 1:
        raise ValueError(f"--devices needs a number from 1 on, or all, got {wanted!r}")
    count = int(wanted)
    if count % num_processes:
        raise ValueError(
            f"--devices {count} cannot be shared equally by {num_processes} processes: use a "
            f"multiple of {num_processes}"
        )
    local = count // num_processes
    if not launch.backend_started():
        launch.simulate_cpu_devices(local)
    devices = jax.devices() if jax.device_count() >= count else jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"--devices {count}: this jax has started with {len(devices)} devices")
    if devices[0].platform == "cpu" and local > 1:
        say(f"simulating {local} CPU devices" + (" a process" if num_processes > 1 else ""))
    return devices[:count]


def count_steps(args: argparse.Namespace, dataset: str, steps_per_epoch: int) -> int:
    """Return how many steps to train: --steps, or --epochs, or the data set's usual ones."""
    if args.steps is not None:
        return int(args.steps)
    epochs = EPOCHS[dataset] if args.epochs is None else args.epochs
    return int(epochs) * steps_per_epoch


def make_optimizer(args: argparse.Namespace, steps: int) -> tx.optim.Optimizer:
    """Return the optimizer with its learning rate, scaled, warmed up and decayed as asked for."""
    rate = args.learning_rate
    if rate is None:
        rate = LEARNING_RATES[args.optimizer] / (2 if args.delay else 1)
    if args.lr_scaling == "linear":
        rate = tx.optim.linear_scaling(rate, args.batch_size, BASE_BATCH)
    schedule = tx.optim.warmup(rate, args.warmup) if args.warmup else rate
    if args.decay == "cosine":
        if args.warmup >= steps:
            raise ValueError(
                f"--decay cosine needs more steps than the warm-up's {args.warmup}, got {steps}: "
                "train longer, or make --warmup shorter"
            )
        schedule = tx.optim.cosine(rate, steps, args.warmup)
    if args.optimizer == "adamw":
        return tx.optim.adamw(schedule)
    return tx.optim.sgd(schedule, momentum=0.9)


def make_data_parallel(args: argparse.Namespace) -> tx.DP:
    """Return how gradients are exchanged, and what of the state is sharded."""
    # 0.1 / (1 - 0.9) is 1: no larger steps than without it (docs/local-sgd.md).
    outer = tx.optim.sgd(0.1, momentum=0.9, nesterov=True) if args.outer == "nesterov" else None
    return tx.DP(
        axis="data",
        shard=args.shard,
        buckets=args.bucket_mb,
        algorithm=args.algorithm,
        compression=make_compression(args.compress),
        reduction=args.reduction,
        sync_every=args.sync_every,
        outer=outer,
        delay=args.delay,
    )


def make_compression(text: str | None) -> Any:
    """Return the compression that --compress names, with the number after its colon."""
    name, _, number = (text or "").partition(":")
    try:
        if name == "powersgd":
            return tx.compression.powersgd(rank=int(number or 2), start=100)
        if name == "top_k":
            return tx.compression.top_k(float(number or 0.01))
    except ValueError as error:
        raise ValueError(f"--compress {text}: {error}") from None
    return text


def make_loggers(args: argparse.Namespace) -> list[tx.loggers.Logger]:
    """Return the loggers that write into --log-dir, if there is one."""
    if not args.log_dir:
        return []
    folder = pathlib.Path(args.log_dir)
    chosen = [LOGGERS[name] for name in dict.fromkeys(args.log_formats or ["jsonl"])]
    if jax.process_index() == 0:  # a logger that fails later does not end the run
        folder.mkdir(parents=True, exist_ok=True)
        for make, name in chosen:
            if make is tx.loggers.TensorBoard:
                (folder / name).mkdir(exist_ok=True)
            else:
                (folder / name).touch()
    return [make(folder / name) for make, name in chosen]


def make_checkpoints(args: argparse.Namespace) -> tx.Checkpoints | None:
    """Return where the run is saved, if it is."""
    names = ("save_every", "keep", "resume")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.checkpoint_dir is not None:
        every = given.pop("save_every", 100)
        return tx.Checkpoints(args.checkpoint_dir, every=every, **given)
    for name in given:
        flag = name.replace("_", "-")
        raise ValueError(f"--{flag} needs --checkpoint-dir: without it nothing is saved")
    return None


def agree(own: str) -> str:
    """Return on every process the text that process 0 gave."""
    return launch.share("dataset", own)


def say(text: str) -> None:
    """Print on rank 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def say_loss_scale(state: tx.TrainState) -> None:
    """Print the loss scale, if there is one, and how many steps it skipped."""
    if state.loss_scaling is not None:
        scale = float(state.loss_scaling.scale)
        say(f"loss scale {scale:g}; {nonfinite.describe_skipped(state)}")


def run(train: Callable[[argparse.Namespace], int], argv: list[str] | None = None) -> int:
    """Train as the command line says; an error that the user can mend is one line.

    Args:
      train: what to call with the parsed flags; returns the exit code.
      argv: of the command line; None takes those of the process.

    Returns:
      The exit code: that of `train`, 2 after an error, 130 after Ctrl-C.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("txcore").setLevel(logging.INFO)
    args = parse(argv)
    try:
        return train(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        watch.failed(error)  # the other ranks are waiting for this one
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
