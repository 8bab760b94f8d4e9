"""A run with compressed gradients that is killed, from inside, without a word.

python killed_compressed_run.py FOLDER COMPRESSION BATCH

COMPRESSION is a key of `KINDS`; the process gets SIGKILL when it asks for batch BATCH.
"""

import os
import signal
import sys
import time

import checkpoint_cases as runs
import jax
import numpy as np

import txcore as tx

KINDS = {
    "bf16": "bf16",
    "int8": "int8",
    "powersgd": tx.compression.powersgd(1, start=2),
    "top-k": tx.compression.top_k(0.2),
}
STEPS = 9


def params():
    """Parameters of the toy model that are large enough for two factors."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (4, 32), "w2": (32, 1)}
    return {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}


def options(kind):
    plan = tx.Plan(data_parallel=tx.DP("data", compression=KINDS[kind]))
    return {"plan": plan, "params": params(), "steps": STEPS}


def main(folder, kind, last):
    """Run until the end of this process."""
    jax.config.update("jax_num_cpu_devices", 2)
    made = 0

    def batches(epoch):
        nonlocal made
        for batch in runs.batches(epoch):
            if made == last:
                while not runs.saved(folder):  # the checkpoint is written beside the run
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            made += 1
            yield batch

    runs.train(folder, data=batches, prefetch=0, **options(kind))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
