"""Time of one whole MNIST training step: transfer, forward, backward, reduction, update."""

import jax
import numpy as np
import pytest
from mnist_step import BATCH_PER_DEVICE, prepare_step


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("model", ["cnn", "cnn3x3"])
def test_train_step(benchmark, model, devices):
    engine, step, state, batch = prepare_step(model, devices)
    state, first = engine.run(step, state, batch)  # compiles

    def one():
        nonlocal state
        state, metrics = engine.run(step, state, batch)
        return jax.block_until_ready((state, metrics))[1]

    metrics = benchmark(one)

    assert np.isfinite(metrics["loss"])
    assert metrics["loss"] < first["loss"]  # the same batch again and again
    benchmark.extra_info |= {
        "devices": devices,
        "batch_per_device": BATCH_PER_DEVICE,
        "compile_seconds": engine.compile_seconds,
    }
    if benchmark.stats is not None:
        images = BATCH_PER_DEVICE * devices
        benchmark.extra_info["images_per_s"] = images / benchmark.stats.stats.median
