"""What checkpoints, the watch and the pre-flight cost a run of the MNIST step.

    taskset -c 0,1 python benchmarks/fit_costs.py
    taskset -c 0,1 txcore launch -n 2 --no-pin benchmarks/fit_costs.py

In turns: some steps, and as many with a checkpoint written beside them. With several processes also
what the pre-flight takes once, and the CPU time of the watch's threads.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import threading
import time

import jax
from tabulate import tabulate

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "examples" / "mnist"))

import mnist_step

import txcore as tx
from txcore import launch
from txcore.launch import preflight, watch
from txcore.train import Position
from txcore.train.batches.placer import shard_batch


def watch_seconds():
    """Return the CPU time of the watch's threads so far, where the system tells it."""
    total = 0.0
    for thread in threading.enumerate():
        stat = pathlib.Path(f"/proc/self/task/{thread.native_id}/schedstat")
        if thread.name.startswith("txcore-") and stat.exists():
            total += int(stat.read_text().split()[0]) / 1e9
    return total


def main():
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100, help="from one checkpoint to the next")
    args = parser.parse_args()
    if launch.cluster():
        tx.initialize()
    world = launch.world_size()
    launch.simulate_cpu_devices(args.devices // world)
    engine, step, state, batch = mnist_step.prepare_step(args.model, args.devices)
    part = {name: x[: len(x) // world] for name, x in batch.items()}
    batch = shard_batch(part, engine.mesh, engine.plan)
    folder = launch.share("folder", tempfile.mkdtemp())
    done = 0

    def some_steps():
        nonlocal state, done
        for _ in range(args.steps):
            watch.reach(done)
            watch.at("step", done, engine.last_words)
            state, metrics = engine.run(step, state, batch)
            jax.block_until_ready(metrics)
            watch.at("data", done)
            done += 1

    times, ratios, blocked = [], [], []
    with tx.Checkpoints(folder, every=args.steps, keep=1) as checkpoints:
        state, _ = checkpoints.restore(state)
        some_steps()
        checkpoints.save(state, Position(steps=done))
        some_steps()
        before = watch_seconds(), time.perf_counter()
        for _ in range(args.rounds):
            marks = [time.perf_counter()]
            some_steps()
            marks.append(time.perf_counter())
            checkpoints.save(state, Position(steps=done))
            blocked.append(time.perf_counter() - marks[-1])
            some_steps()
            marks.append(time.perf_counter())
            plain, saving = marks[1] - marks[0], marks[2] - marks[1]
            times.append(plain / args.steps)
            ratios.append(saving / plain)
        share = (watch_seconds() - before[0]) / (time.perf_counter() - before[1])
    started = time.perf_counter()
    preflight.check("cost", preflight.facts_of(engine.mesh.mesh, batch))
    once = time.perf_counter() - started
    calls = 10_000
    started = time.perf_counter()
    for i in range(calls):
        watch.at("step", i, "")
    noting = (time.perf_counter() - started) / calls
    watch.at("after fit", 0)
    if jax.process_index() == 0:
        rows = [
            ("a step", f"{1e3 * statistics.median(times):.1f} ms"),
            (f"{args.steps} steps beside a checkpoint", f"x {statistics.median(ratios):.3f}"),
            (
                "of that the copy, before the steps go on",
                f"{1e3 * statistics.median(blocked):.1f} ms",
            ),
            ("the watch: a note", f"{1e9 * noting:.0f} ns"),
            ("the watch: CPU time of its threads", f"{100 * share:.3f} % of a core"),
            ("the pre-flight's comparison, once a step function", f"{1e3 * once:.1f} ms"),
        ]
        print(f"{args.model}, {args.devices} devices, {world} process(es), jax {jax.__version__}")
        print(tabulate(rows, tablefmt="github"))


if __name__ == "__main__":
    main()
