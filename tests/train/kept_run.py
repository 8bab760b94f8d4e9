"""One rank of two: keep the best, hold keys in extra, and have rank 1's data fail.

python kept_run.py COORDINATOR RANK FOLDER

Prints a line of JSON: what this rank has found.
"""

import json
import sys

import jax
import numpy as np
import toys

import txcore as tx


class Unsized:
    """Batches whose number nobody knows, as of a torch loader of an IterableDataset."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        raise TypeError("object of type 'IterableDataset' has no len()")

    def __iter__(self):
        return iter(self.batches)


def go_on(engine, state, data):
    """Catch what both ranks raise alike, and go on with the state that it has."""
    told = []
    batches = list(data(0))
    broken = [batches[0], {**batches[1], "y": np.full_like(batches[1]["y"], np.nan)}]
    first = engine.create_state(toys.params(), extra=state.extra)
    for options in ({"data": batches, "steps": 4}, {"data": batches, "steps": 2}):
        try:
            first = engine.fit(toys.train_step, first, **options)
        except ValueError as error:
            told.append(type(error).__name__)
            first = error.state
    try:
        engine.fit(toys.train_step, engine.create_state(toys.params()), broken, steps=2)
    except FloatingPointError as error:
        told.append(type(error).__name__)
    first = engine.fit(toys.train_step, first, Unsized(batches), steps=6)
    return [*told, int(first.step)]


def main(coordinator, rank, folder):
    """Run one rank."""
    tx.initialize(coordinator, 2, rank)
    engine = toys.engine(0, mesh=tx.MeshSpec())
    state = engine.create_state(
        toys.params(), extra={"key": jax.random.key(7), "none": np.zeros((0, 2), np.float32)}
    )

    def data(epoch):
        for i in range(8):
            yield {name: np.split(x, 2)[rank] for name, x in toys.batch(seed=i).items()}

    def evaluate(state):
        """The ranks do not agree: rank 0's values count."""
        values = {2: 0.5, 4: 0.9, 6: 0.7} if rank == 0 else {2: 0.9, 4: 0.1, 6: 1.0}
        return {"accuracy": values[int(state.step)]}

    checkpoints = tx.Checkpoints(folder, every=3, keep=1, keep_best=("accuracy", "max"))
    given = {"evaluate": evaluate, "eval_every": 2, "checkpoints": checkpoints}
    state = engine.fit(toys.train_step, state, data, steps=6, **given)
    again = engine.create_state(
        toys.params(), extra={"key": jax.random.key(7), "none": np.zeros((0, 2), np.float32)}
    )
    with tx.Checkpoints(folder, every=3, resume="must") as resumed:
        again, _ = resumed.restore(again)
    found = {
        "best": checkpoints.best.name,
        "best_w2": tx.load_params(folder, toys.params(), best=True)["w2"].ravel().tolist(),
        "step": int(again.step),
        "key": jax.random.key_data(again.extra["key"]).tolist(),
        "w2": np.asarray(again.stored_params["w2"]).ravel().tolist(),
    }

    def broken(epoch):
        for i, batch in enumerate(data(epoch)):
            if rank == 1 and i == 3:
                raise OSError("shard 7 is gone")
            yield batch

    found["alike"] = go_on(engine, again, data)
    tx.barrier("before the end")
    if rank == 0:
        print(json.dumps(found), flush=True)
    try:
        engine.fit(toys.train_step, state, broken, steps=14)
    except OSError as error:
        found["left"] = int(error.state.step)
        found["left_w2"] = np.asarray(error.state.stored_params["w2"]).ravel().tolist()
        print(json.dumps(found), flush=True)
        raise


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
