"""One rank of a run over gloo that has a bad day: told by the environment, as a user's script.

python bad_day.py [--odd KIND --rank R] [--work S] [--hang S]

KIND is what rank R does: before it joins ("exit 0", "exit 2", "late"), or in the middle of the work
("kill", "stop", "hold", "raise", "leave", "term"). `--hang`: what rank R does after the work.
"""

import argparse
import ctypes
import os
import signal
import sys
import time


def have_a_bad_day(kind):
    """Do in the middle of the work what a rank should not."""
    print("bad", f"{time.time():.2f}", flush=True)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "hold":  # C code that keeps the GIL
        ctypes.PyDLL(None).sleep(300)
    elif kind == "raise":
        raise ValueError("batch 7 is damaged")
    elif kind == "leave":
        sys.exit(0)
    elif kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)


def main():
    """Join, sum over all again and again, and say what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--odd", default="")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--work", type=float, default=1.0, help="seconds")
    parser.add_argument("--hang", type=float, default=0.0, help="seconds")
    args = parser.parse_args()
    mine = os.environ["JAX_PROCESS_ID"] == str(args.rank)
    if mine and args.odd.startswith("exit"):
        sys.exit(int(args.odd[-1]))
    if mine and args.odd == "late":
        time.sleep(3)
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P

    import txcore as tx
    from txcore.launch import watch

    begun = time.monotonic()
    tx.initialize()
    print(f"joined after {time.monotonic() - begun:.1f} s", flush=True)
    mesh = tx.MeshSpec(axes=("data",))
    own = np.float32([10.0 ** jax.process_index()])
    x = jax.make_array_from_process_local_data(mesh.sharding("data"), own, (mesh.size,))
    total = jax.jit(
        jax.shard_map(
            lambda x: tx.psum(x, "data"), mesh=mesh.mesh, in_specs=P("data"), out_specs=P()
        )
    )
    signal.signal(signal.SIGTERM, lambda *_: watch.request_stop("SIGTERM"))
    for step in range(round(args.work * 50)):
        if watch.reach(step):
            print(f"txcore: {watch.stop_reason()}: stopped after {step} steps", file=sys.stderr)
            sys.exit(143)
        watch.at("data", step)
        time.sleep(0.02)
        if mine and step == round(args.work * 25):
            have_a_bad_day(args.odd)
        watch.at("step", step, "the sum")
        found = np.asarray(total(x)).tolist()
    watch.at("after fit", step)
    print("sum", found, flush=True)
    time.sleep(args.hang if mine else 0.0)


if __name__ == "__main__":
    main()
