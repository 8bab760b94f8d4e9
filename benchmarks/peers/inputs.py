"""Write what every contender starts from: the batches and the initial weights.

In a process of its own, since the harness forks workers and must not start jax itself.
"""

import argparse
from typing import Any

import models
import numpy as np
from data.dataset import load


def global_batches(
    images: np.ndarray, labels: np.ndarray, batch: int, count: int
) -> dict[str, np.ndarray]:
    """Return the first `count` global batches: images [count, batch, 28, 28, 1], labels.

    Raises:
      ValueError: there are too few examples for one batch.
    """
    count = min(count, len(labels) // batch)
    if count < 1:
        raise ValueError(f"the data set has {len(labels)} examples, too few for a batch of {batch}")
    return {
        "images": images[: count * batch].reshape(count, batch, *images.shape[1:]),
        "labels": labels[: count * batch].reshape(count, batch),
    }


def make_synthetic(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images with the mean and the spread of MNIST's, and labels, all random."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((count, 28, 28, 1), np.float32)
    return images, rng.integers(0, 10, count).astype(np.int32)


def load_named(params: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return a model's parameters as flat arrays, named "conv0/w" and so on."""
    return {
        f"{layer}/{name}": np.asarray(value)
        for layer, arrays in params.items()
        for name, value in arrays.items()
    }


def main() -> None:
    """Write the two files."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--data", required=True)
    add("--weights", required=True)
    add("--dataset", required=True)
    add("--batch", type=int, required=True, help="global")
    add("--count", type=int, required=True, help="batches at most")
    args = parser.parse_args()
    if args.dataset == "synthetic":
        images, labels = make_synthetic(args.batch * args.count)
    else:
        data = load(args.dataset)
        images, labels = data.train_images, data.train_labels
    np.savez(args.data, **global_batches(images, labels, args.batch, args.count))
    layers = models.layers_of("cnn3x3", dropout=0)
    np.savez(args.weights, **load_named(models.init(layers, seed=0)))


if __name__ == "__main__":
    main()
