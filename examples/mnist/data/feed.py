"""The batches of one process of a run."""

from collections.abc import Iterable
from typing import Any

from data.batches import batches_per_epoch, epoch_batches
from data.dataset import Dataset

_EVAL_BATCH = 1024  # examples, or the next multiple of the number of devices


class Feed:
    """The batches of this process: the same global order for any number of devices.

    Args:
      data: the data set.
      batch_size: examples in a global batch; a multiple of the number of devices.
      shares: devices that share each batch, this process's index, and the number of processes.
      seed: of the order, at least 0.
      train_size: how many examples to train on, the first ones; None takes all.

    Raises:
      ValueError: a size is out of its range, named by the script's flag.

    Example:
      >>> import numpy as np
      >>> images, labels = np.zeros((6, 28, 28, 1), np.float32), np.arange(6, dtype=np.int32)
      >>> feed = Feed(Dataset("tiny", images, labels, images, labels), 4, seed=0)
      >>> feed.steps_per_epoch, [len(batch["label"]) for batch in feed.train(epoch=0)]
      (2, [4, 4])
    """

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        shares: tuple[int, int, int] = (1, 0, 1),
        *,
        seed: int,
        train_size: int | None = None,
    ) -> None:
        device_count, process_index, process_count = shares
        size = len(data.train_labels) if train_size is None else train_size
        if not 1 <= size <= len(data.train_labels):
            raise ValueError(
                f"--train-size needs a number from 1 to {len(data.train_labels)}, got {train_size}"
            )
        if batch_size < 1 or batch_size % device_count:
            raise ValueError(
                f"--batch-size {batch_size} cannot be shared equally by {device_count} "
                f"devices: use a positive multiple of {device_count}"
            )
        self.steps_per_epoch = batches_per_epoch(size, batch_size)
        self._data, self._size, self._batch_size, self._seed = data, size, batch_size, seed
        self._eval_batch = -(-_EVAL_BATCH // device_count) * device_count
        self._part: dict[str, Any] = {
            "process_index": process_index,
            "process_count": process_count,
        }

    def train(self, epoch: int) -> Iterable[Any]:
        """Return the batches of one epoch."""
        return epoch_batches(
            self._data.train_images[: self._size],
            self._data.train_labels[: self._size],
            batch_size=self._batch_size,
            seed=self._seed,
            epoch=epoch,
            **self._part,
        )

    def test(self) -> Iterable[Any]:
        """Return the test set in order."""
        return epoch_batches(
            self._data.test_images,
            self._data.test_labels,
            batch_size=self._eval_batch,
            seed=0,
            epoch=0,
            shuffle=False,
            **self._part,
        )
