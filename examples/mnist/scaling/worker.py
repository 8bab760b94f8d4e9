"""One rank of a case: train, then time what a step is made of. Started by run.py."""

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cli
import jax
import models
import numpy as np
from data.dataset import Dataset, load
from data.feed import Feed
from jax.sharding import PartitionSpec as P
from train import make_steps

import txcore as tx
from txcore import bench, launch
from txcore.train.batches.placer import shard_batch

WARM, TIMED = 5, 30  # bare steps
SMALL = 4096  # bytes: an all-reduce of so few is all latency


class Notes:
    """A logger of losses, accuracies and the time of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []  # after each step, since the beginning
        self.accuracies: list[tuple[int, float]] = []
        self.examples = 0

    def __call__(self, record: tx.loggers.Record) -> None:
        """Keep a record."""
        if record.kind == "step":
            self.losses.append(record.metrics["loss"])
            self.seconds.append(record.seconds)
        elif record.kind == "eval":
            self.accuracies.append((record.step, record.metrics["test_accuracy"]))
        self.examples = record.examples


def count_reading(read: Callable[[int], Any], spent: list[float]) -> Callable[[int], Iterator[Any]]:
    """Return `read`, which notes the CPU seconds that each batch takes its thread."""

    def read_counted(epoch: int) -> Iterator[Any]:
        batches = iter(read(epoch))
        while True:
            started = time.thread_time()
            batch = next(batches, None)
            if batch is None:
                return
            spent.append(time.thread_time() - started)
            yield batch

    return read_counted


def time_bare_steps(engine: tx.Engine, step: Any, state: Any, batch: Any) -> tuple[Any, float]:
    """Return the state and the median seconds of a step on a batch that lies on the devices."""
    placed, seconds = shard_batch(batch, engine.mesh, engine.plan), []
    for _ in range(WARM + TIMED):
        started = time.perf_counter()
        state, metrics = engine.run(step, state, placed)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    return state, statistics.median(seconds[WARM:])


def time_all_reduces(mesh: tx.MeshSpec, sizes: Sequence[int]) -> list[dict[str, float]]:
    """Return the seconds of a mean of so many bytes over all workers, with nothing beside it."""
    setup, mean = bench.Setup(mesh.mesh, ("data",)), bench.OPERATIONS["pmean"]
    rows = [bench.measure_size(setup, mean, "float32", size) for size in sizes]
    return [{"bytes": row.size_bytes, "seconds": row.seconds} for row in rows]


def make_engine(
    asked: dict[str, Any], mesh: tx.MeshSpec, held: dict[str, P], steps: int, notes: Notes
) -> tx.Engine:
    """Return the engine of the example at this case's learning rate."""
    more = asked["batch_size"] // asked["base_batch"] if asked["rate_scaling"] == "linear" else 1
    rate = asked["learning_rate"] * more
    warmup = min(asked["warmup"], max(steps // 4, 1))
    return tx.Engine(
        mesh=mesh,
        plan=tx.Plan(data_parallel=tx.DP("data"), batch=held),
        optimizer=tx.optim.sgd(tx.optim.warmup(rate, warmup), momentum=0.9),
        loggers=[notes],
        seed=asked["seed"],
    )


def measure(asked: dict[str, Any], mesh: tx.MeshSpec, dataset: Dataset) -> dict[str, Any]:
    """Train and time as a case asks; return what was found."""

    def feed_of(batch_size: int) -> Feed:
        shares = (mesh.size, jax.process_index(), jax.process_count())
        return Feed(dataset, batch_size, shares, seed=asked["seed"], train_size=asked["train_size"])

    feed, notes, reading = feed_of(asked["batch_size"]), Notes(), list[float]()
    held = feed.hold_on(mesh)  # as train.py does
    steps = asked["epochs"] * feed.steps_per_epoch if asked["trains"] else 0
    layers = models.layers_of(asked["model"])
    engine = make_engine(asked, mesh, held, steps, notes)
    train_step, eval_step = make_steps(layers)
    state = engine.create_state(models.init(layers, asked["seed"]))
    if steps:
        state = engine.fit(
            train_step,
            state,
            count_reading(feed.train, reading),
            steps=steps,
            evaluate=lambda state: engine.evaluate(eval_step, state, feed.test()),
            eval_every=feed.steps_per_epoch,
            prefetch=asked["prefetch"],
        )
    compiled = engine.compile_seconds
    bare = {}
    for size in (asked["batch_size"], *asked["bare_batches"]):
        other = feed_of(size)
        other.hold_on(mesh)
        batch = next(iter(other.train(0)))
        state, bare[size] = time_bare_steps(engine, train_step, state, batch)
    gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(state.stored_params))
    return {
        **describe_training(notes, bare[asked["batch_size"]], reading),
        "dataset": dataset.name,
        "test_examples": len(dataset.test_labels),
        "set_on_devices": bool(held),
        "compile_seconds": compiled or engine.compile_seconds,
        "bare_step_seconds": bare,
        "gradient_bytes": gradient,
        "all_reduce": time_all_reduces(mesh, (SMALL, gradient)) if mesh.size > 1 else [],
    }


def describe_training(notes: Notes, bare: float, reading: Sequence[float]) -> dict[str, Any]:
    """Return what a training took, apart: its steps, and what input adds to them."""
    each = np.diff(notes.seconds)
    total = notes.seconds[-1] if notes.seconds else 0.0
    whole = float(np.median(each)) if len(each) else None
    return {
        "steps": len(notes.losses),
        "examples": notes.examples,
        "train_seconds": total,
        "images_per_second": notes.examples / total if total else None,
        "step_seconds": bare,
        "step_seconds_in_training": whole,
        "input_seconds": None if whole is None else max(whole - bare, 0.0),
        "reading_cpu_seconds": statistics.median(reading) if reading else None,
        "test_accuracy": notes.accuracies[-1][1] if notes.accuracies else None,
        "accuracy_curve": notes.accuracies,
        "loss_curve": notes.losses,
    }


def main() -> None:
    """Run the case in the first argument."""
    asked = json.loads(sys.argv[1])
    tx.initialize()
    devices = cli.choose_devices(str(asked["workers"]), launch.world_size())
    dataset = load(
        asked["dataset"],
        asked["data_dir"],
        rank=jax.process_index(),
        barrier=tx.barrier,
        agree=cli.agree,
    )
    found = measure(asked, tx.MeshSpec(devices), dataset)
    if jax.process_index() == 0:
        text = json.dumps({**found, "jax": jax.__version__, "platform": devices[0].platform})
        pathlib.Path(asked["out"]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
