"""Train with sharded state on four devices and checkpoints, and be killed in the middle.

python sharded_run.py FOLDER SHARD STEPS KILLED_AT
"""

import os
import signal
import sys

import jax
import sharded_models as models

import txcore as tx


def data(killed_at):
    """Return batches; reading the one after `killed_at` ends the process."""

    def batches(epoch):
        for seed in range(8):
            if seed == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield models.batch(seed)

    return batches


def fit(folder, shard, steps, killed_at=None, shape=(2, 2), axis="data"):
    """Train for so many steps, going on from the newest checkpoint of the folder."""
    optimizer = tx.optim.adamw(0.05, clip_norm=1.0)
    engine = models.engine(shape, optimizer, shard=shard, shard_axis=axis)
    with tx.Checkpoints(folder, every=2) as checkpoints:
        state = engine.create_state(models.params())
        given = {"steps": steps, "checkpoints": checkpoints, "prefetch": 0}
        return engine.fit(models.train_step, state, data(killed_at), **given)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    fit(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
