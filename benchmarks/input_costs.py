"""What reading costs a run: the MNIST example's loop beside its bare step, images a second.

    taskset -c 0,1 python benchmarks/input_costs.py

In turns, in one process: the step on one batch that lies on the devices; `fit` as train.py runs it,
over rows of a set that lies there; `fit` over shuffled batches that the host cuts; and `fit` over a
loader that waits for 80% of a step's time before each batch, as for a disk.
"""

import argparse
import pathlib
import statistics
import sys
import time

import jax
import numpy as np
from tabulate import tabulate

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "examples" / "mnist"))

import mnist_step
from data.dataset import Dataset
from data.feed import Feed

from txcore import launch
from txcore.train.batches.placer import shard_batch

EXAMPLES = 8192


def random_feed(batch_size, devices):
    """Return the example's batches of random images."""
    rng = np.random.default_rng(0)
    images = rng.random((EXAMPLES, 28, 28, 1), np.float32)
    labels = rng.integers(0, 10, EXAMPLES).astype(np.int32)
    data = Dataset("random", images, labels, images[:128], labels[:128])
    return Feed(data, batch_size, (devices, 0, 1), seed=0)


def prepare_forms(args):
    """Return functions that run a number of steps, by name, and the images of a step."""
    images = mnist_step.BATCH_PER_DEVICE * args.devices
    engine, step, state, batch = mnist_step.prepare_step(args.model, args.devices)
    batch = shard_batch(batch, engine.mesh, engine.plan)
    feed, made, waits = random_feed(images, args.devices), 0, 0.0

    def run_bare(steps):
        nonlocal state, made
        for _ in range(steps):
            state, metrics = engine.run(step, state, batch)
            jax.block_until_ready(metrics)
        made += steps

    def run_fit(data, **options):
        def run(steps):
            nonlocal state, made
            made += steps
            state = engine.fit(step, state, data, steps=made, **options)

        return run

    def run_on_devices():
        held = random_feed(images, args.devices)
        whole = held.hold_on(engine.mesh)
        other, same_step, own, _ = mnist_step.prepare_step(args.model, args.devices, batch=whole)
        own_made = 0

        def run(steps):
            nonlocal own, own_made
            own_made += steps
            own = other.fit(same_step, own, held.train, steps=own_made)

        return run

    def slow(epoch):
        for one in feed.train(epoch):
            time.sleep(waits)
            yield one

    run_bare(5)
    started = time.perf_counter()
    run_bare(args.steps)
    waits = 0.8 * (time.perf_counter() - started) / args.steps
    return images, {
        "bare step": run_bare,
        "fit, as train.py": run_on_devices(),
        "fit, cut by the host": run_fit(feed.train),
        "cut by the host, prefetch=0": run_fit(feed.train, prefetch=0),
        "a loader of 80% of a step": run_fit(slow),
        "that loader, prefetch=0": run_fit(slow, prefetch=0),
    }


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cnn3x3")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=60, help="in each round")
    args = parser.parse_args()
    launch.simulate_cpu_devices(args.devices)
    images, forms = prepare_forms(args)
    for run in forms.values():
        run(2)  # the forms that have an engine of their own compile here
    times, cpu = ({name: [] for name in forms} for _ in range(2))
    for _ in range(args.rounds):
        for name, run in forms.items():
            marks = time.perf_counter(), time.process_time()
            run(args.steps)
            times[name].append((time.perf_counter() - marks[0]) / args.steps)
            cpu[name].append((time.process_time() - marks[1]) / args.steps)
    rows = []
    for name, own in times.items():
        rate = images / statistics.median(own)
        pace = statistics.median(b / o for o, b in zip(own, times["bare step"], strict=True))
        work = statistics.median(o / b for o, b in zip(cpu[name], cpu["bare step"], strict=True))
        rows.append((name, f"{rate:,.0f}", f"{pace:.3f}", f"{work:.3f}"))
    print(f"{args.model}, {args.devices} devices, {images} images a step, jax {jax.__version__}")
    heads = ("form", "images/s", "x bare", "CPU time x bare")
    print(tabulate(rows, heads, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
