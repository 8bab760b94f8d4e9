"""A run of one or several processes to be killed and resumed: losses as JSON lines, checkpoints.

    python long_run.py FOLDER [--steps N] [--until N] [--resume auto|must]

It joins the run that its environment names (JAX_COORDINATOR_ADDRESS and so on). Every step depends
on all that a checkpoint has to hold: keys, momentum, a schedule, extra state, the data's order.
"""

import argparse
import pathlib
import sys
import time

import jax
import numpy as np

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "train"))

import toys

import txcore as tx
from txcore import launch

PASS, ROWS, WIDE = 7, 24, 200_000  # batches of an epoch, rows of one, floats to save beside it
EVERY = 20


@tx.step_fn
def step(state, batch):
    """Add noise by the run's keys to the inputs, and keep a running mean of the loss."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(state.example_keys(batch))
    noisy = {**batch, "x": batch["x"] + 0.1 * noise}
    loss, grads = tx.value_and_grad(toys.local_loss)(state.params, noisy)
    grads, state = state.sync_gradients(grads)
    loss = tx.pmean(loss, "data")
    state = state.apply_gradients(grads=grads)
    extra = {**state.extra, "mean": 0.9 * state.extra["mean"] + 0.1 * loss}
    return state.replace(extra=extra), {"loss": loss, "mean": extra["mean"]}


@tx.step_fn
def longer_step(state, batch):
    """Reduce once more than `step`."""
    state, metrics = step.fn(state, batch)
    return state, {**metrics, "loss": tx.pmax(tx.vary(metrics["loss"], "data"), "data", name="odd")}


def part(epoch, pause, odd):
    """Yield this process's part of the batches of an epoch, slowly."""
    rank, world = jax.process_index(), jax.process_count()
    rows = ROWS // world
    for i in range(PASS):
        batch = toys.batch(ROWS, seed=100 * epoch + i)
        time.sleep(pause)
        if odd == "error" and (epoch, i) == (4, 2):
            raise ValueError("batch 2 of epoch 4 is damaged")
        mine = slice(rank * rows, (rank + 1) * rows - (odd == "batch"))
        yield {name: x[mine] for name, x in batch.items()}


def main():
    """Train, and write "losses.jsonl" into the folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--until", type=int, help="stop after so many of the steps")
    parser.add_argument("--resume", default="auto")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds before each batch")
    parser.add_argument("--every", type=int, default=EVERY)
    parser.add_argument("--odd", help="what rank 1 does differently")
    args = parser.parse_args()
    if launch.cluster():
        tx.initialize()
    odd = args.odd if jax.process_index() == 1 else None
    if odd == "clock":  # a day ahead
        now = time.time
        time.time = lambda: now() + 86_400
    if odd == "version":
        tx.version.VERSION = "0.0.1"
    engine = tx.Engine(
        mesh=tx.MeshSpec(),
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.sgd(
            tx.optim.cosine(0.2 if odd == "constant" else 0.1, args.steps, 5), momentum=0.9
        ),
        loggers=[tx.loggers.JSONL(args.folder / "losses.jsonl")],
        seed=int(odd == "seed"),
    )
    extra = {"mean": np.float32(0), "wide": np.arange(WIDE, dtype=np.float32)}
    checkpoints = tx.Checkpoints(args.folder / "saved", every=args.every, resume=args.resume)
    engine.fit(
        longer_step if odd == "collective" else step,
        engine.create_state(toys.params(), extra),
        lambda epoch: part(epoch, args.pause, odd),
        steps=args.until or args.steps,
        checkpoints=checkpoints,
    )


if __name__ == "__main__":
    main()
