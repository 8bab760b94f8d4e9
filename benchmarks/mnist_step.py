"""The MNIST example's whole training step on random images, for the suites here."""

import jax
import models
import numpy as np
import train

import txcore as tx

BATCH_PER_DEVICE = 64


def prepare_step(model, devices, *, batch=None, **options):
    """Return (engine, step, state, batch) of a model without dropout on the first devices.

    `batch` is the plan's, the other options are the engine's.
    """
    layers = models.layers_of(model)
    if models.uses_dropout(layers):
        layers = models.layers_of(model, dropout=0)
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:devices]),
        plan=tx.Plan(data_parallel=tx.DP("data"), batch=batch or {}),
        optimizer=tx.optim.sgd(0.02, momentum=0.9),
        **options,
    )
    step, _ = train.make_steps(layers)
    return engine, step, engine.create_state(models.init(layers, seed=0)), random_batch(devices)


def random_batch(devices):
    """Return a global batch of random images and labels."""
    rng = np.random.default_rng(0)
    count = BATCH_PER_DEVICE * devices
    return {
        "image": rng.random((count, 28, 28, 1), np.float32),
        "label": rng.integers(0, 10, count).astype(np.int32),
        "mask": np.ones(count, np.float32),
        "weight": np.ones(count, np.float32),
    }
