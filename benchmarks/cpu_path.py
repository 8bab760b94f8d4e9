"""What each change to the CPU path brings: the MNIST step with one change more in every line.

    taskset -c 0,1 python benchmarks/cpu_path.py

The variants live in one process and run in turns, so that a change of the machine's speed meets
them all.
"""

import argparse
import pathlib
import statistics
import sys
import time
from dataclasses import replace
from typing import NamedTuple

import jax
from tabulate import tabulate

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "examples" / "mnist"))

import mnist_step

from txcore import launch
from txcore.kernels import compiler_options
from txcore.kernels.conv import xla as conv
from txcore.kernels.dense import xla as dense
from txcore.kernels.dispatch import registry
from txcore.train.batches.placer import shard_batch

OFF = compiler_options("cpu")
PLAIN, ON_CPU = conv.Config("direct"), conv.Config("direct", on_cpu=True)
WINDOWS, WINOGRAD = (conv.Config(form, on_cpu=True) for form in ("windows", "winograd"))
# As many at a time as the kernels' own guess.
SOME_WINDOWS, SOME_WINOGRAD = replace(WINDOWS, images=16), replace(WINOGRAD, images=8)


class Variant(NamedTuple):
    """One line of the table: what it adds, and how the step is then compiled."""

    added: str
    options: dict[str, str]
    first: conv.Config
    other: conv.Config
    transposed_dx: bool


VARIANTS = (
    Variant("pooling with a VJP of its own", {}, PLAIN, PLAIN, False),
    Variant("XLA's YNN fusions off", OFF, PLAIN, PLAIN, False),
    Variant("values computed once, sums as products", OFF, ON_CPU, ON_CPU, False),
    Variant("the first convolution by windows", OFF, WINDOWS, ON_CPU, False),
    Variant("the second by Winograd's products", OFF, WINDOWS, WINOGRAD, False),
    Variant("some images at a time", OFF, SOME_WINDOWS, SOME_WINOGRAD, False),
    Variant("dense's dx by the transposed product", OFF, SOME_WINDOWS, SOME_WINOGRAD, True),
)


def prepare_step(variant, devices, model):
    """Return a function that runs one step of a variant and waits for it."""

    def choose_variant(problem, kernels):
        if problem.op == "conv2d":
            config = variant.first if problem.shapes[0][3] == 1 else variant.other
            return registry.Choice("xla", config, "given")
        if problem.op == "dense":
            return registry.Choice("xla", dense.Config(variant.transposed_dx), "given")
        return None

    given = {"compiler_options": variant.options}
    engine, step, state, batch = mnist_step.prepare_step(model, devices, **given)
    batch = shard_batch(batch, engine.mesh, engine.plan)

    def one():
        nonlocal state
        state, metrics = engine.run(step, state, batch)
        jax.block_until_ready((state, metrics))

    with registry.decided_by(choose_variant):
        one()  # compiles
    for _ in range(2):
        one()
    return one


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--model", default="cnn3x3", choices=("cnn3x3", "dropout-cnn"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8, help="in each round")
    args = parser.parse_args()
    launch.simulate_cpu_devices(args.devices)
    steps = [prepare_step(variant, args.devices, args.model) for variant in VARIANTS]
    times = [[] for _ in VARIANTS]
    for _ in range(args.rounds):
        for one, own in zip(steps, times, strict=True):
            started = time.perf_counter()
            for _ in range(args.steps):
                one()
            own.append(1e3 * (time.perf_counter() - started) / args.steps)
    images = mnist_step.BATCH_PER_DEVICE * args.devices
    rows = []
    for i, (variant, own) in enumerate(zip(VARIANTS, times, strict=True)):
        before = times[max(i - 1, 0)]
        gain = statistics.median(b / o for b, o in zip(before, own, strict=True))
        total = statistics.median(b / o for b, o in zip(times[0], own, strict=True))
        median = statistics.median(own)
        rows.append((variant.added, f"{median:.1f}", f"{1e3 * images / median:,.0f}", gain, total))
    print(f"{args.model}, {args.devices} devices, {images} images a step", end=", ")
    print(f"jax {jax.__version__}, median of {args.rounds} rounds of {args.steps} steps")
    heads = ("added", "ms a step", "images/s", "x the line before", "x the first")
    print(tabulate(rows, heads, tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
