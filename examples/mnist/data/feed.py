"""The batches of one process of a run."""

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import txcore as tx
from data.batches import batches_per_epoch, epoch_batches
from data.dataset import Dataset

_EVAL_BATCH = 1024  # examples, or the next multiple of the number of devices
_SHARE = 1 / 8  # of a device's memory that the set may take
_HOST_BYTES = 1 << 30  # that its copies on a process's CPU devices may, which share its memory
WHOLE = {"images": P(), "labels": P()}  # the leaves of a batch that are the set itself


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
        self._batch_size, self._seed = batch_size, seed
        self._eval_batch = -(-_EVAL_BATCH // device_count) * device_count
        self._part: dict[str, Any] = {
            "process_index": process_index,
            "process_count": process_count,
        }

        self._train = data.train_images[:size], data.train_labels[:size]
        self._test = data.test_images, data.test_labels
        self._held: tuple[Any, Any] | None = None

    def hold_on(self, mesh: tx.MeshSpec) -> dict[str, P]:
        """Put the whole set on each device where it fits, so that batches only name its rows.

        The order of the examples, and what a step gets from `take_rows`, stay as they are.

        Returns:
          What to declare by `tx.Plan(batch=)`: the leaves that are the set; {} where it stays on
          the host.
        """
        if not fits_on(mesh.devices, (*self._train, *self._test)):
            return {}

        def put(images: np.ndarray, labels: np.ndarray) -> dict[str, jax.Array]:
            # Row by row: that is how they are read.
            host = {"images": images.reshape(len(images), -1), "labels": labels.astype(np.int32)}
            whole = mesh.sharding()
            return {
                name: jax.make_array_from_process_local_data(whole, x, x.shape)
                for name, x in host.items()
            }

        self._held = put(*self._train), put(*self._test)
        return WHOLE

    def train(self, epoch: int) -> Iterable[Any]:
        """Return the batches of one epoch."""
        held = None if self._held is None else self._held[0]
        order: dict[str, Any] = {"batch_size": self._batch_size, "seed": self._seed, "epoch": epoch}
        return self._batches(held, *self._train, **order)

    def test(self) -> Iterable[Any]:
        """Return the test set in order."""
        held = None if self._held is None else self._held[1]
        order: dict[str, Any] = {
            "batch_size": self._eval_batch,
            "seed": 0,
            "epoch": 0,
            "shuffle": False,
        }
        return self._batches(held, *self._test, **order)

    def _batches(
        self, held: Any, images: np.ndarray, labels: np.ndarray, **order: Any
    ) -> Iterator[Any]:
        alone = held is not None
        batches = epoch_batches(images, labels, rows_alone=alone, **order, **self._part)
        return ({**batch, **held} for batch in batches) if alone else batches


def fits_on(devices: Sequence[Any], arrays: Iterable[np.ndarray]) -> bool:
    """Tell whether each of these devices can hold these arrays beside a training step.

    The devices are those of all processes, so that all decide alike; memory is known of one's own.
    """
    size = sum(array.nbytes for array in arrays)
    owners = collections.Counter(device.process_index for device in devices)
    own = [device for device in devices if device.process_index == jax.process_index()]
    limits: list[Any] = [(device.memory_stats() or {}).get("bytes_limit") for device in own]
    if any(limit is None for limit in limits):
        return size * max(owners.values()) <= _HOST_BYTES
    return size <= _SHARE * min(limits)


def take_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the examples of this device, of a batch that may only name rows of the whole set.

    A row past the last one is zeros, as padding is.

    Example:
      >>> batch = {"row": jnp.array([1, 2]), "images": jnp.ones((2, 784)), "labels": jnp.arange(2)}
      >>> taken = take_rows(batch)
      >>> taken["image"].shape, taken["label"].tolist()
      ((2, 28, 28, 1), [1, 0])
    """
    if "row" not in batch:
        return batch
    taken = {key: leaf for key, leaf in batch.items() if key not in ("row", *WHOLE)}
    images, labels = (
        jnp.take(batch[name], batch["row"], axis=0, mode="fill", fill_value=0) for name in WHOLE
    )
    side = round(images.shape[1] ** 0.5)
    return {"image": images.reshape(-1, side, side, 1), "label": labels, **taken}
