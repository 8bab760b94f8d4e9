"""One rank of a run that compares with the others what it is about to run.

python preflight_worker.py COORDINATOR RANK WORLD JSON

JSON: "differs" (what rank "rank" has otherwise), "times" (how often a check is timed).
"""

import json
import statistics
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from watch_worker import join, say

from txcore.launch import preflight
from txcore.launch.watch import watch
from txcore.profiling import audit


def program(order, rows):
    """Return a program with two collectives, in one order or the other, and its arguments."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))

    def step(x):
        if order == "sum first":
            total = jax.lax.psum(x.sum(), "data")
            return total + jax.lax.pmax(x.max(), "data")
        largest = jax.lax.pmax(x.max(), "data")
        return largest + jax.lax.psum(x.sum() + 0 * largest, "data")

    x = jax.ShapeDtypeStruct((rows, 3), np.float32, sharding=NamedSharding(mesh, P("data")))
    return mesh, jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P()), x


def main(coordinator, rank, world, plan):
    """Run one rank."""
    join(coordinator, rank, world)
    watch.start()
    differs = plan.get("differs", {}) if rank == plan.get("rank") else {}
    if "jax" in differs:
        jax.__version__ = differs["jax"]
    mesh, step, x = program(differs.get("order", "sum first"), differs.get("rows", 4 * world))
    lines = [f"{c.kind} {c.dtype} {c.source}" for c in audit(step, x).collectives]
    facts = preflight.facts_of(mesh, {"x": x}, lines)
    if "late_s" in differs:
        time.sleep(differs["late_s"])
    try:
        preflight.check("step", facts, timeout_s=plan.get("timeout_s", 60))
    except RuntimeError as error:
        say("refused", type(error).__name__, json.dumps(str(error)))
        raise
    seconds = []
    for _ in range(plan.get("times", 0)):
        jax.block_until_ready(np.zeros(1))
        started = time.perf_counter()
        preflight.check("again", facts)
        seconds.append(time.perf_counter() - started)
    say("equal", json.dumps([statistics.median(seconds), max(seconds)] if seconds else []))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
