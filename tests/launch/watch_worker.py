"""One rank of a run that is watched: steps over gloo, and one rank that does what it should not.

python watch_worker.py COORDINATOR RANK WORLD JSON

JSON: "watch" (arguments of watch.start), "steps", "step_s" (host time a step), and "fault":
{"rank", "step", "kind", ...}. What happens is printed, each line with its time.
"""

import ctypes
import json
import os
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from txcore.launch.watch import watch

LABEL = "train_step, whose last collective is psum/loss (worker.py:1)"


def say(*words):
    """Print with the time, for the test to read even if the process dies."""
    print(f"{time.time():.3f}", *words, flush=True)


def join(coordinator, rank, world):
    """Do what tx.initialize does."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator, world, rank, coordinator_bind_address=coordinator, initialization_timeout=60
    )


def make_step():
    """Return a step that sums over all ranks."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    ones = np.ones(jax.local_device_count(), np.float32)
    sharding = jax.sharding.NamedSharding(mesh, P("data"))
    x = jax.make_array_from_process_local_data(sharding, ones)
    step = jax.jit(total).lower(x).compile()
    return lambda: np.asarray(step(x))


def do(fault):
    """Do what a rank should not."""
    kind = fault["kind"]
    say("fault", kind)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "raise":
        raise ValueError("batch 7 is damaged")
    elif kind == "exit":
        sys.exit(3)
    elif kind == "sleep":
        time.sleep(fault["seconds"])
    elif kind == "hold":  # C code that keeps the GIL: every Python thread stands still
        ctypes.PyDLL(None).sleep(fault["seconds"])
    elif kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif kind == "shutdown":
        jax.distributed.shutdown()
        time.sleep(fault["seconds"])
        sys.exit(0)


def main(coordinator, rank, world, plan):
    """Run one rank."""
    join(coordinator, rank, world)
    signal.signal(signal.SIGTERM, lambda *_: watch.request_stop("SIGTERM"))
    watch.start(**plan.get("watch", {}))
    step = make_step()
    fault = plan.get("fault", {})
    mine = rank in fault.get("ranks", [fault.get("rank")])
    made = 0
    for made in range(plan["steps"]):
        if watch.reach(made):
            say("stops before", made, watch.stop_reason())
            return
        watch.at("data", made)
        time.sleep(plan.get("step_s", 0.01))
        if mine and made == fault["step"]:
            do(fault)
        watch.at("step", made, LABEL)
        step()
        if made in (1, 10):
            say("made", made)
    watch.at("after fit", plan["steps"])
    say("done", made)
    time.sleep(plan.get("after_s", {}).get(str(rank), 0))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
