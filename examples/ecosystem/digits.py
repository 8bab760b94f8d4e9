"""scikit-learn's 1,797 digits of 8 x 8 pixels, for the models in this folder."""

from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_digits

TRAIN = 1536


def batches(steps: int, size: int = 128) -> Iterator[dict[str, np.ndarray]]:
    """Yield shuffled training batches: "image" (size, 8, 8, 1) from 0 to 1, "label" (size,)."""
    images, labels = _digits()
    random = np.random.default_rng(0)
    for _ in range(steps):
        chosen = random.choice(TRAIN, size, replace=False)
        yield {"image": images[chosen], "label": labels[chosen]}


def test_batch() -> dict[str, np.ndarray]:
    """Return 256 digits that no training batch has."""
    images, labels = _digits()
    return {"image": images[TRAIN : TRAIN + 256], "label": labels[TRAIN : TRAIN + 256]}


def _digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return (data.images[..., None] / 16).astype(np.float32), data.target.astype(np.int32)
