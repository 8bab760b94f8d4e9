"""The batch plan: one global order of the examples for any number of devices and processes."""

from collections.abc import Iterator

import numpy as np


def batches_per_epoch(count: int, batch_size: int) -> int:
    """Return the number of global batches in an epoch, the last one perhaps not full.

    Args:
      count: examples in the data set, at least 1.
      batch_size: examples in a global batch, at least 1.

    Returns:
      ceil(count / batch_size).

    Raises:
      ValueError: an argument is not a whole number of at least 1.

    Example:
      >>> batches_per_epoch(60_000, 128)
      469
    """
    _require_whole("count", count, 1)
    _require_whole("batch_size", batch_size, 1)
    return -(-count // batch_size)


def epoch_batches(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    rows_alone: bool = False,
    batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Return the batches of one epoch: every example once, the last batch masked.

    The order depends on `seed` and `epoch` alone. Each process gets its contiguous part of
    every global batch, so that the parts of all processes, one after the other, are the batch
    that one process would get.

    Args:
      images: [n, ...].
      labels: [n].
      rows_alone: whether batches only name rows of the set, for `take_rows`.
      batch_size: examples in a global batch; a multiple of `process_count`.
      seed: of the order, at least 0.
      epoch: counts from 0; each has its own order.
      shuffle: False keeps the order of the data set (for evaluation).
      process_index: this process, counted from 0.
      process_count: processes that share each batch.

    Returns:
      An iterator of {"image": [b, ...], "label": int32 [b], "mask": float32 [b], "weight": float32
      [b]} with b = batch_size // process_count. Rows past the last example are zeros with mask 0.
      The mean of weight x value over all rows of the global batch is the mean over its real
      examples: the weights are batch_size / (how many there are), and 0. No device has to count.
      With `rows_alone` "row": int32 [b] is in the place of images and labels; past the last example
      it is n.

    Raises:
      ValueError: an argument is out of its range, or the batch does not divide.

    Example:
      >>> x, y = np.ones((3, 28, 28, 1), np.float32), np.arange(3)
      >>> for batch in epoch_batches(x, y, batch_size=2, seed=0, epoch=0, shuffle=False):
      ...     print(batch["image"].shape, batch["label"], batch["mask"], batch["weight"])
      (2, 28, 28, 1) [0 1] [1. 1.] [1. 1.]
      (2, 28, 28, 1) [2 0] [1. 0.] [2. 0.]
    """
    _check_data(images, labels)
    _require_whole("batch_size", batch_size, 1)
    _require_whole("seed", seed, 0)
    _require_whole("epoch", epoch, 0)
    _check_processes(batch_size, process_index, process_count)
    order = _epoch_order(len(labels), seed, epoch) if shuffle else np.arange(len(labels))
    whole = (order[start : start + batch_size] for start in range(0, len(labels), batch_size))
    size = batch_size // process_count
    mine = slice(process_index * size, (process_index + 1) * size)
    # Not a generator function: the checks above run at the call, not at the first batch.
    data = None if rows_alone else (images, labels)
    count = len(labels)
    return (_take(data, count, rows[mine], size, batch_size / len(rows)) for rows in whole)


def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    # Spelled out rather than default_rng, whose generator NumPy may change.
    sequence = np.random.SeedSequence([seed, epoch])
    return np.random.Generator(np.random.PCG64(sequence)).permutation(count)


def _take(
    data: tuple[np.ndarray, np.ndarray] | None,
    count: int,
    rows: np.ndarray,
    size: int,
    weight: float,
) -> dict[str, np.ndarray]:
    """Return the examples `rows`, each with a weight, padded with zeros to `size`."""
    mask = np.zeros(size, np.float32)
    mask[: len(rows)] = 1
    counted = {"mask": mask, "weight": mask * np.float32(weight)}
    if data is None:
        row = np.full(size, count, np.int32)
        row[: len(rows)] = rows
        return {"row": row, **counted}
    images, labels = data
    image = np.zeros((size, *images.shape[1:]), images.dtype)
    label = np.zeros(size, np.int32)
    image[: len(rows)] = images[rows]
    label[: len(rows)] = labels[rows]
    return {"image": image, "label": label, **counted}


def _check_data(images: np.ndarray, labels: np.ndarray) -> None:
    if labels.ndim != 1 or images.ndim < 1 or len(images) != len(labels) or len(labels) == 0:
        raise ValueError(
            "images and labels: required shapes [n, ...] and [n] with n at least 1, given "
            f"{list(images.shape)} and {list(labels.shape)}; pass one label for each image"
        )


def _check_processes(batch_size: int, process_index: int, process_count: int) -> None:
    _require_whole("process_count", process_count, 1)
    _require_whole("process_index", process_index, 0)
    if process_index >= process_count:
        raise ValueError(
            f"process_index: required less than process_count {process_count}, given "
            f"{process_index}; count the processes from 0"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size: required a multiple of the {process_count} processes, given "
            f"{batch_size}; use {batch_size - batch_size % process_count + process_count}"
        )


def _require_whole(name: str, value: int, low: int) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < low:
        raise ValueError(
            f"{name}: required a whole number of at least {low}, given {value!r}; pass such a one"
        )
