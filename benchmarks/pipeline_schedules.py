"""A table of pipeline schedules: ticks, bubble, and what a device keeps, by XLA's own account.

    python benchmarks/pipeline_schedules.py [--few] [--results FOLDER]

The bubble is exact, of the schedule as data, beside the papers' formula. The memory is
`memory_analysis` of the compiled step, less what does not depend on the schedule's buffers: nothing
is run, since seconds of simulated devices that share two cores say nothing.
"""

import argparse
import pathlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from tabulate import tabulate

import txcore as tx
from txcore.parallel.pipeline.buffers import plan_buffers

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
WIDTH, ROWS, LAYERS = 256, 16, 8
RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def first(params, batch):
    return batch


def block(params, x, batch, stage):
    for w in params["w"]:
        x = x + jnp.tanh(x @ w)
    return x


def last(params, x, batch):
    return jnp.mean(x * x, -1)


def formula(name, p, m, v):
    """Return the papers' bubble, where p divides m and the three passes take the same time."""
    waiting = {"zb-h1": 3 * m}.get(name, v * m)
    return Fraction(p - 1, waiting + p - 1)


def ticks_of(name, p, m, v):
    """Return the papers' number of ticks, in the units of docs/pipeline.md."""
    return {
        "gpipe": 2 * (m * v + p - 1),
        "1f1b": m + 2 * p - 2,
        "interleaved": m * v + p * v + p - 2,
        "zb-h1": 3 * m + p - 1,
    }[name]


def temporary_bytes(schedule):
    """Compile a step for so many stages; return the bytes beside its arguments and results."""
    p, m, v = schedule.stages, schedule.microbatches, schedule.chunks
    mesh = Mesh(np.array(jax.devices()[:p]), ("pipe",), axis_types=(AxisType.Auto,))
    step = tx.pipeline.value_and_grad(first, block, last, schedule, axis="pipe")
    spec = {"blocks": {"w": P("pipe") if v == 1 else P(None, "pipe")}}
    layers = (LAYERS,) if v == 1 else (v, LAYERS // v)
    params = {"blocks": {"w": jax.ShapeDtypeStruct((*layers, WIDTH, WIDTH), np.float32)}}
    batch = jax.ShapeDtypeStruct((m * ROWS, WIDTH), np.float32)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(spec, P()), out_specs=(P(), spec))
    memory = jax.jit(mapped).lower(params, batch).compile().memory_analysis()
    return memory.temp_size_in_bytes


def rows(few):
    for p in (2, 4):
        for m in (4, 32) if few else (4, 8, 16, 32):
            for name, v in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1)):
                made = tx.pipeline.make_schedule(name, stages=p, microbatches=m, chunks=v)
                bubble, wanted = made.find_bubble(), formula(name, p, m, v)
                assert (bubble, made.ticks) == (wanted, ticks_of(name, p, m, v)), (name, p, m)
                kept = plan_buffers(made).stash.size
                yield [
                    *(name, p, m, v, made.ticks, f"{bubble}", f"{float(bubble):.3f}", kept),
                    f"{temporary_bytes(made) / 1e6:.2f}",
                ]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--few", action="store_true", help="the fewest and the most microbatches")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    given = parser.parse_args()
    names = ("schedule", "p", "m", "v", "ticks", "bubble", "", "kept", "temporary MB")
    text = (
        f"jax {jax.__version__}, CPU; {LAYERS} layers of {WIDTH} x {WIDTH}, microbatches of "
        f"{ROWS} x {WIDTH}, float32.\nA tick of gpipe and zb-h1 is one pass, of 1f1b and "
        "interleaved a forward and a backward pass (of a chunk).\nbubble: of the schedule, equal "
        "to its formula in each line; kept: forward passes (of a chunk) whose values wait.\n\n"
        + tabulate([*rows(given.few)], names, disable_numparse=True)
    )
    print(text)
    (given.results / "pipeline_schedules.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
