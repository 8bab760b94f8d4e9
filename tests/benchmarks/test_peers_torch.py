"""The weights as PyTorch lays them out, where it is installed: in the peers' environment."""

import argparse
import pathlib
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "peers"), str(ROOT / "examples" / "mnist")]

import torch_train  # noqa: E402
import torch_worker  # noqa: E402

SHAPES = {
    "conv0": (3, 3, 1, 32),
    "conv1": (3, 3, 32, 64),
    "dense2": (3136, 128),
    "dense3": (128, 10),
}


def weights():
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in SHAPES.items():
        arrays[f"{name}/w"] = rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape).astype(np.float32)
        arrays[f"{name}/b"] = rng.normal(0, 0.1, shape[-1]).astype(np.float32)
    return arrays


def oracle(arrays, x):
    """Return the logits of NHWC images in float64, by sums over shifted images."""
    for name in ("conv0", "conv1"):
        w = arrays[f"{name}/w"].astype(np.float64)
        n, height, width, _ = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        y = sum(
            padded[:, i : i + height, j : j + width] @ w[i, j] for i in range(3) for j in range(3)
        )
        y = np.maximum(y + arrays[f"{name}/b"], 0)
        x = y.reshape(n, height // 2, 2, width // 2, 2, -1).max(axis=(2, 4))
    x = np.maximum(x.reshape(len(x), -1) @ arrays["dense2/w"] + arrays["dense2/b"], 0)
    return x @ arrays["dense3/w"] + arrays["dense3/b"]


@pytest.mark.parametrize("form", ["best", "usual"])
def test_the_model_is_txcores(form):
    images = np.random.default_rng(1).normal(size=(3, 28, 28, 1)).astype(np.float32)
    model = torch_worker.Net()
    model.load_state_dict(torch_worker.state_dict(weights()))
    if form == "best":
        model = model.to(memory_format=torch.channels_last)
    logits = model(torch_worker.image_tensor(images, form)).detach().numpy()
    np.testing.assert_allclose(logits, oracle(weights(), images.astype(np.float64)), atol=1e-4)


def test_the_rate_rises_and_falls_as_txcores_does():
    """Two steps of warm-up, then half a cosine over the four steps that are left."""
    args = argparse.Namespace(optimizer="sgd", learning_rate=0.5, warmup=2, epochs=3)
    optimizer, schedule = torch_train.make_optimizer(args, torch.nn.Linear(1, 1), 2)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    falling = [0.5 * (1 + np.cos(np.pi * quarter / 4)) / 2 for quarter in range(4)]
    np.testing.assert_allclose(rates, [0.25, 0.5, *falling], rtol=1e-6)
