"""Text as bytes, in windows: the same ones on any number of devices."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

import txcore as tx

VOCABULARY = 256


def load(path: str | None) -> tuple[str, np.ndarray]:
    """Return a text's name and its bytes.

    Args:
      path: of a text file; None takes the English reference text of Python's standard library.
    """
    if path is not None:
        return pathlib.Path(path).name, np.frombuffer(pathlib.Path(path).read_bytes(), np.uint8)
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    return "pydoc_data.topics", np.frombuffer(text.encode(), np.uint8)


def split(text: np.ndarray, length: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the part to train on, and the last tenth to test on."""
    cut = len(text) - len(text) // 10
    if cut <= batch * length + length or len(text) - cut <= length:
        raise ValueError(
            f"a text of {len(text)} bytes is too short for a batch of {batch} x {length}: give a "
            "longer one, or a smaller --batch-size or --length"
        )
    return text[:cut], text[cut:]


def bigram_loss(train: np.ndarray, test: np.ndarray) -> float:
    """Return the mean loss on `test`, nats a byte, of the pairs counted in `train` (plus one)."""
    counts = np.ones((VOCABULARY, VOCABULARY))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    shares = counts / counts.sum(1, keepdims=True)
    return float(-np.log(shares[test[:-1], test[1:]]).mean())


class Windows:
    """Batches of windows of a text, of which each process gets its rows.

    Args:
      batch: rows of the global batch.
      length: tokens of a window.
      context: devices along the context axis, in whose order the tokens are put.
      parts: how many processes have other rows, and which of them this is.
    """

    def __init__(self, batch: int, length: int, context: int, parts: tuple[int, int]) -> None:
        self._batch, self._length, self._context = batch, length, context
        count, own = parts
        if batch % count:
            raise ValueError(f"--batch-size {batch} needs to be a multiple of {count} processes")
        self._rows = slice(own * batch // count, (own + 1) * batch // count)

    def shuffled(self, text: np.ndarray, epoch: int, seed: int) -> Iterator[dict[str, Any]]:
        """Return an epoch: every window once, in an order of seed and epoch alone."""
        rng = np.random.default_rng([seed, epoch])
        offset = rng.integers(self._length)  # other windows in each epoch
        starts = np.arange(offset, len(text) - self._length, self._length)
        starts = rng.permutation(starts)[: self.count(text) * self._batch]
        for rows in starts.reshape(-1, self._batch):
            yield self._cut(text, rows[self._rows])

    def in_order(self, text: np.ndarray) -> Iterator[dict[str, Any]]:
        """Return all windows of a text, the last batch padded."""
        starts = np.arange(0, len(text) - self._length, self._length)
        for first in range(0, len(starts), self._batch):
            rows = starts[first : first + self._batch][self._rows]
            yield tx.pad_batch(self._cut(text, rows), self._rows.stop - self._rows.start)

    def count(self, text: np.ndarray) -> int:
        """Return the batches of an epoch, whatever its offset."""
        return (len(text) - 2 * self._length) // self._length // self._batch

    def _cut(self, text: np.ndarray, starts: np.ndarray) -> dict[str, Any]:
        windows = text[starts[:, None] + np.arange(self._length + 1)].astype(np.int32)
        parts = {"tokens": windows[:, :-1], "labels": windows[:, 1:]}
        return {key: tx.context.split_chunks(x, self._context) for key, x in parts.items()}
