"""A run to save, damage and resume: a small model whose every step depends on all that is kept."""

import pathlib

import jax
import numpy as np
import toys

import txcore as tx

STEPS, EVERY = 14, 3
PASS = 4  # batches of an epoch: a resumed run begins within one


def batches(epoch):
    """Return the batches of an epoch, other ones in every epoch."""
    return [toys.batch(seed=10 * epoch + i, masked=i) for i in range(PASS)]


@tx.step_fn
def step(state, batch):
    """Noise by the run's keys, momentum, a schedule, extra state: nothing may be forgotten."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(state.example_keys(batch))

    def loss_of(params):
        return toys.local_loss(
            params, {**batch, "x": batch["x"] + 0.1 * noise * batch["mask"][:, None]}
        )

    loss, grads = tx.value_and_grad(loss_of)(state.params)
    grads, state = state.sync_gradients(grads)
    loss = tx.pmean(loss, "data")
    state = state.apply_gradients(grads=grads)
    mean = 0.9 * state.extra["mean"] + 0.1 * loss
    return state.replace(extra={"mean": mean}), {"loss": loss, "mean": mean}


class Curve:
    """A logger: the loss and the mean of every step, bit for bit."""

    def __init__(self):
        self.steps, self.ends = {}, []

    def __call__(self, record):
        if record.kind == "step":
            self.steps[record.step] = (record.metrics["loss"], record.metrics["mean"])
        elif record.kind == "end":
            self.ends.append((record.step, record.examples))


def engine(n=2, curve=None, **options):
    schedule = tx.optim.cosine(0.1, STEPS, 2)
    return toys.engine(
        n,
        optimizer=options.pop("optimizer", None) or tx.optim.sgd(schedule, momentum=0.9),
        loggers=[curve] if curve else [],
        **options,
    )


def start(engine, params=None):
    return engine.create_state(params or toys.params(), extra={"mean": np.float32(0)})


def train(
    directory,
    *,
    n=2,
    steps=STEPS,
    data=batches,
    resume="auto",
    keep=3,
    params=None,
    prefetch=2,
    **options,
):
    """Run to `steps`; return (curve, state)."""
    curve = Curve()
    made = engine(n, curve, **options)
    checkpoints = None
    if directory is not None:
        checkpoints = tx.Checkpoints(directory, every=EVERY, keep=keep, resume=resume)
    given = {"steps": steps, "checkpoints": checkpoints, "prefetch": prefetch}
    state = made.fit(step, start(made, params), data, **given)
    return curve, state


def saved(directory):
    return sorted(p.name for p in pathlib.Path(directory).glob("step_*"))


def equal(a, b):
    """Compare two states bit for bit, whichever devices they lie on."""
    ours, theirs = (jax.tree.map(np.asarray, s.arrays) for s in (a, b))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
