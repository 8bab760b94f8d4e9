"""One rank of two with sharded state: train, compare, save, resume; then begin otherwise.

python sharded_rank.py COORDINATOR RANK FOLDER

Prints a line of JSON: what this rank has found.
"""

import json
import sys

import jax
import numpy as np
import sharded_models as models

import txcore as tx


def halves(seed, rank):
    """Return this rank's half of a batch."""
    return {name: np.split(x, 2)[rank] for name, x in models.batch(seed).items()}


def engine(shard):
    """Return an engine on all devices of both ranks."""
    return tx.Engine(
        mesh=tx.MeshSpec(axes=(*models.DATA, "model"), shape=(1, 2, 1)),
        plan=tx.Plan(data_parallel=tx.DP(models.DATA, shard=shard)),
        optimizer=tx.optim.sgd(0.1, momentum=0.9, clip_norm=0.5),
    )


def main(coordinator, rank, folder):
    """Run one rank."""
    tx.initialize(coordinator, 2, rank)
    found = {}
    for shard in models.KINDS:
        made = engine(shard)
        batches = [halves(seed, rank) for seed in range(3)]
        for steps in (2, 3):
            with tx.Checkpoints(f"{folder}/{shard}", every=2) as checkpoints:
                state = made.fit(
                    models.train_step,
                    made.create_state(models.params()),
                    batches,
                    steps=steps,
                    checkpoints=checkpoints,
                    check_replicas_every=1,
                )
        found[shard] = made.evaluate(models.eval_step, state, batches[:1])["loss"]
    sent = made.create_state(models.params(seed=rank), broadcast_from=0)
    found["sent"] = made.evaluate(models.eval_step, sent, batches[:1])["loss"]
    try:
        made.run(models.train_step, made.create_state(models.params(seed=rank)), batches[0])
    except tx.TxcoreError as error:
        found["refused"] = str(error)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 1)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
