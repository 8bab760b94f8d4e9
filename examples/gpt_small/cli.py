"""The flags of train.py: what they are, what they refuse, and what they stand for."""

import argparse
import json
import logging
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import model

import txcore as tx
from txcore import launch
from txcore.launch import watch

_TEXT = "Train a small GPT under any plan, and prove which collectives the compiled step contains."


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=_TEXT)
    add = parser.add_argument
    add("--text", help="a text file; default: the reference text of Python's standard library")
    add("--mesh", default="data=1", help="devices by axis: data=2,context=2,pipe=2,model=2")
    add("--schedule", default="1f1b", choices=["gpipe", "1f1b", "interleaved", "zb-h1"])
    add("--microbatches", type=int, default=1, help="parts of each device's batch; default: 1")
    add("--chunks", type=int, default=1, help="of layers on a stage, for interleaved and gpipe")
    add("--shard", choices=["optimizer", "gradients", "parameters"], help="what devices split")
    add("--compress", choices=["bf16", "fp16", "int8"], help="how gradients are averaged")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128)
    add("--heads", type=int, default=8, help="of queries")
    add("--kv-heads", type=int, help="of keys and values; default: as many as --heads")
    add("--positions", default="rotary", choices=["rotary", "learned"])
    add("--tied", action="store_true", help="take the embedding for the head too")
    add(
        "--sequence-parallel",
        action="store_true",
        help="split sequences along model between layers",
    )
    add("--length", type=int, default=128, help="bytes of a sequence")
    add("--batch-size", type=int, default=32, help="sequences of the global batch")
    add("--steps", type=int, default=600)
    add("--learning-rate", type=float, default=2e-3)
    add("--warmup", type=int, default=50, help="steps; then cosine to 0")
    add("--eval-every", type=int, help="steps between evaluations; default: at the end")
    add("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--seed", type=int, default=0)
    add("--sample", type=int, default=200, help="bytes to generate at the end; 0 for none")
    add("--results", help="write DIR/results.json")
    add("--checkpoint-dir", help="save the run there, and resume it from there")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add("--resume", default="auto", choices=["auto", "never", "must"])
    add("--audit", default=True, action=argparse.BooleanOptionalAction)
    add("--coordinator", help="host:port of process 0, for processes started by hand")
    add("--num-processes", type=int)
    add("--process-id", type=int)
    return parser.parse_args(argv)


def read_mesh(text: str) -> dict[str, int]:
    """Return the devices along each of the model's axes, by --mesh.

    Example:
      >>> read_mesh("data=2,pipe=4")
      {'data': 2, 'context': 1, 'pipe': 4, 'model': 1}
    """
    sizes = dict.fromkeys(model.AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"--mesh needs axes of {', '.join(model.AXES)} with their sizes, as "
                f"data=2,model=2, got {part!r}"
            )
        sizes[axis] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int], processes: int) -> tx.MeshSpec:
    """Return the mesh; simulate CPU devices where there are fewer real ones."""
    count = math.prod(sizes.values())
    if count % processes:
        raise ValueError(f"--mesh has {count} devices, which {processes} processes cannot share")
    if not launch.backend_started():
        launch.simulate_cpu_devices(count // processes)
    devices = jax.devices() if jax.device_count() >= count else jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--mesh has {count} devices, but this jax has started with {len(devices)}"
        )
    return tx.MeshSpec(devices[:count], axes=model.AXES, shape=tuple(sizes.values()))


def make_config(args: argparse.Namespace, vocabulary: int) -> model.GPT:
    """Return the model."""
    return model.GPT(
        vocabulary=vocabulary,
        length=args.length,
        width=args.width,
        layers=args.layers,
        heads=args.heads,
        kv_heads=args.kv_heads or args.heads,
        positions=args.positions,
        tied=args.tied,
        sequence=args.sequence_parallel,
    )


def make_plan(args: argparse.Namespace, config: model.GPT) -> tx.Plan:
    """Return what is parallel over which axis."""
    return tx.Plan(
        data_parallel=tx.DP("data", shard=args.shard, compression=args.compress),
        tensor_parallel=tx.TP("model", rules=config.tensor_rules),
        pipeline=tx.PP(
            "pipe", microbatches=args.microbatches, schedule=args.schedule, chunks=args.chunks
        ),
        context="context",
    )


def make_optimizer(args: argparse.Namespace) -> tx.optim.Optimizer:
    """Return AdamW with warm-up and cosine decay."""
    steps, warmup = max(args.steps, 1), min(args.warmup, args.steps // 2)
    schedule = tx.optim.cosine(args.learning_rate, steps, warmup)
    return tx.optim.adamw(schedule, clip_norm=1.0)


def make_checkpoints(args: argparse.Namespace) -> tx.Checkpoints | None:
    """Return where the run is saved, if it is."""
    if args.checkpoint_dir is None:
        return None
    return tx.Checkpoints(args.checkpoint_dir, every=args.save_every, resume=args.resume)


class History:
    """A logger that keeps what --results writes."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.test_loss: float | None = None
        self.end: tx.loggers.Record | None = None

    def __call__(self, record: tx.loggers.Record) -> None:
        """Keep a record."""
        match record.kind:
            case "step":
                self.losses.append(record.metrics["loss"])
            case "eval":
                self.test_loss = record.metrics["test_loss"]
            case "end":
                self.end = record

    def write(self, folder: str | None, **more: Any) -> None:
        """Write the results as JSON on rank 0; None writes nothing."""
        if folder is None or jax.process_index():
            return
        end = self.end
        found = {
            "loss_curve": self.losses,
            "test_loss": self.test_loss,
            "sequences_per_second": end.examples_per_second if end else None,
            "compile_seconds": end.compile_seconds if end else None,
            **more,
        }
        path = pathlib.Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        (path / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Print on rank 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def run(train: Callable[[argparse.Namespace], int], argv: list[str] | None = None) -> int:
    """Train as the command line says; an error that the user can mend is one line.

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
