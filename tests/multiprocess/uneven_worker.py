"""One rank of a run whose ranks have different numbers of examples, or none.

    python uneven_worker.py '[["curve", {"sizes": [[4, 4, 3], []], "size": 4}], ...]'

It joins the run that its environment names. Each case prints a line of JSON: its name, and what
came of it. The data are those of `part`, which the test makes as well.
"""

import pathlib
import sys

import jax
import numpy as np

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "train"))

import agreement_worker
import toys

import txcore as tx

LIKE = {"x": np.zeros((1, 4), np.float32), "y": np.zeros(1, np.float32)}


def part(rank, batch, rows):
    """Return a rank's batch: so many examples, none of which another has."""
    whole = toys.batch(max(rows, 1), seed=100 * rank + batch)
    return {key: whole[key][:rows] for key in LIKE}


def parts(sizes):
    """Return this rank's batches, `sizes[rank]` examples in each."""
    rank = jax.process_index()
    return [part(rank, batch, rows) for batch, rows in enumerate(sizes[rank])]


def curve(sizes, size, **options):
    """Train for two epochs, then evaluate; return the losses, the parameters and the evaluation."""
    losses = []
    engine = tx.Engine(
        mesh=tx.MeshSpec(),
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.sgd(0.1),
        loggers=[lambda record: losses.append(record.metrics.get("loss"))],
    )

    def data(epoch):
        return tx.even_batches(parts(sizes), size, like=LIKE)

    start = engine.create_state(toys.params())
    state = engine.fit(toys.train_step, start, data, epochs=2, **options)
    found = engine.evaluate(toys.eval_step, state, data(2))
    params = {name: np.asarray(value).tolist() for name, value in state.stored_params.items()}
    return {"losses": losses, "params": params, "eval": found["loss"]}


def curve_of_groups(sizes, size):
    """Return the same with two steps in each program, over the end of an epoch too."""
    return curve(sizes, size, steps_per_call=2)


def refused():
    """What cannot be made even is refused on every rank alike, and the run goes on."""
    rank = jax.process_index()
    calls = {
        "sizes": lambda: tx.even_batches([], 4 + rank, like=LIKE),
        "like": lambda: tx.even_batches(parts([[4], [], [], []]), 4),
    }
    return {name: agreement_worker.outcome(call) for name, call in calls.items()}


def unpadded(sizes):
    """Train on batches as they are; this does not return where the ranks' rows differ."""
    batches = [tx.pad_batch(batch, len(batch["y"])) for batch in parts(sizes)]
    engine = agreement_worker.engine()
    state = engine.create_state(toys.params())
    return agreement_worker.outcome(
        lambda: int(engine.fit(toys.train_step, state, batches, epochs=1).step)
    )


if __name__ == "__main__":
    agreement_worker.main(globals())
