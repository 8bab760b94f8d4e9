"""Give every rank the same number of batches of one size, however the examples are distributed."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import jax
import numpy as np

from txcore.kernels.common.checks import whole_number
from txcore.launch import key_value
from txcore.launch.watch.verdict import rank_names
from txcore.train.batches.batch import leaves_of, mask_of, name_leaf

_exchanges = itertools.count()  # of this process; every rank makes the same ones, in one order


def pad_batch(batch: Any, size: int) -> Any:
    """Pad a batch with rows of zeros to `size` rows; its leaf "mask" marks them as padding.

    Args:
      batch: pytree of host arrays, each with one row for each example, at most `size` of them, or
        none at all. It is a dict, or has a leaf "mask" already: 1 for what is real, of shape
        (batch,), or (batch, length) where tokens are padded too.
      size: the number of rows after padding.

    Returns:
      The batch with `size` rows; a dict that had no mask has one, float32 of shape (size,).

    Raises:
      ValueError: the batch has more rows than `size`, or its leaves have different numbers.
      TypeError: it has no mask, and is no dict to put one into; or a leaf is no array.

    Example:
      >>> tx.pad_batch({"x": np.array([3.0, 4.0])}, 3)
      {'mask': array([1., 1., 0.], dtype=float32), 'x': array([3., 4., 0.])}
    """
    size = _check_size("pad_batch", size)
    rows = _count_rows("pad_batch", batch)
    if rows > size:
        raise ValueError(
            f"tx.pad_batch needs a batch of at most size={size} rows, got {rows}: give a larger "
            "size, or smaller batches (nothing is dropped)"
        )
    if mask_of(batch) is None:
        if not isinstance(batch, dict):
            raise TypeError(
                "tx.pad_batch needs a dict, or a batch with a leaf 'mask', got "
                f"{type(batch).__name__}: without a mask padding would be taken for examples"
            )
        batch = {**batch, "mask": np.ones(rows, np.float32)}

    def pad_leaf(leaf: Any) -> np.ndarray:
        host = np.asarray(leaf)
        padded = np.zeros((size, *host.shape[1:]), host.dtype)
        padded[:rows] = host
        return padded

    return jax.tree.map(pad_leaf, batch)


def even_batches(
    batches: Iterable[Any], size: int, *, count: int | None = None, like: Any = None
) -> Iterator[Any]:
    """Pad this rank's batches to `size` rows, and add batches until all ranks have as many.

    Each rank has its own part of the data, perhaps a smaller one, or none. A rank that has no more
    examples goes on with batches of padding, so that none waits for it, and none drops what it has.
    With `tx.example_mean(values, batch["mask"], axis=...)` each step is the mean over its real
    examples, however many a rank has of them. Every rank has to call it, once an epoch: the ranks
    exchange how many batches they have, on the host, before the first one.

    Args:
      batches: this rank's batches, each as for `pad_batch`.
      size: rows of each batch on this rank, the same on every rank.
      count: how many batches there are; needed where `batches` has no length.
      like: a batch of this rank's, arrays or shapes, for a rank that may have none: its rows do not
        matter.

    Returns:
      An iterator over the batches, the same number on every rank.

    Raises:
      ValueError: the ranks differ in `size`, a rank without batches has no `like`, or `batches` are
        not as many as `count` (or their length) says.
      TypeError: `batches` has no length, and no `count` is given.

    Example:
      >>> parts = [{"x": np.array([1.0, 2.0])}, {"x": np.array([3.0])}]
      >>> [batch["mask"].tolist() for batch in tx.even_batches(parts, 2)]
      [[1.0, 1.0], [1.0, 0.0]]
      >>> def epoch_data(epoch):  # engine.fit(step, state, epoch_data, epochs=3)
      ...     return tx.even_batches(parts, 2, like={"x": np.zeros(1)})
    """
    size = _check_size("even_batches", size)
    own = _count_batches(batches, count)
    most = _agree_on_count(own, size, has_like=like is not None)
    return _pad_all(batches, size, own, most, like)


def _pad_all(batches: Iterable[Any], size: int, own: int, most: int, like: Any) -> Iterator[Any]:
    made = 0
    for batch in batches:
        if made == own:
            raise ValueError(_describe_count(own, f"more than {own}"))
        like = batch
        yield pad_batch(batch, size)
        made += 1
    if made != own:
        raise ValueError(_describe_count(own, str(made)))
    if made < most:
        padding = pad_batch(jax.tree.map(_without_rows, like), size)
        yield from itertools.repeat(padding, most - made)


def _without_rows(leaf: Any) -> np.ndarray:
    return np.zeros((0, *leaf.shape[1:]), leaf.dtype)


def _count_batches(batches: Any, count: int | None) -> int:
    if count is None and not isinstance(batches, Sized):
        raise TypeError(
            "tx.even_batches needs batches with a length, or count= how many there are, got "
            f"{type(batches).__name__}: the ranks agree on the number of steps before the first "
            "one. Give count=, or list(batches)"
        )
    number = len(batches) if count is None else whole_number(count)
    if number is None or number < 0:
        raise ValueError(f"tx.even_batches needs count= a number from 0 on, got {count!r}")
    return number


def _agree_on_count(own: int, size: int, *, has_like: bool) -> int:
    """Return the largest number of batches on any rank; refuse batches that cannot be padded."""
    name = f"even_batches/{next(_exchanges)}"
    said = [json.loads(text) for text in key_value.gather(name, json.dumps([own, size, has_like]))]
    sizes = [size for _, size, _ in said]
    if len(set(sizes)) != 1:
        raise ValueError(
            f"tx.even_batches needs the same size= on every rank, got {sizes} by rank: a global "
            "batch consists of equal parts"
        )
    most = max(count for count, _, _ in said)
    unknown = {rank for rank, (count, _, has_like) in enumerate(said) if not (count or has_like)}
    if most and unknown:
        raise ValueError(
            f"tx.even_batches needs like= on a rank that has no batch, got none on "
            f"{rank_names(unknown)}: give a batch (arrays or shapes) of what it would have, "
            'like={"x": np.zeros((1, 28, 28))}'
        )
    return most


def _describe_count(said: int, found: str) -> str:
    return (
        f"tx.even_batches needs the batches that were counted, {said} (by count=, or their "
        f"length), got {found}: the ranks have agreed on the number of steps already. Give count= "
        "as many as there are"
    )


def _check_size(op: str, size: Any) -> int:
    number = whole_number(size)
    if number is None or number < 1:
        raise ValueError(f"tx.{op} needs size= a number of rows from 1 on, got {size!r}")
    return number


def _count_rows(op: str, batch: Any) -> int:
    leaves = leaves_of(batch)
    for path, leaf in leaves:
        if not np.shape(leaf):
            raise TypeError(
                f"tx.{op} needs arrays with one row for each example, got "
                f"{type(leaf).__name__} at {name_leaf(path)}: what all examples share is added "
                "afterwards"
            )
    rows = {np.shape(leaf)[0]: name_leaf(path) for path, leaf in leaves}
    if len(rows) != 1:
        given = ", ".join(f"{n} at {where}" for n, where in rows.items()) or "none"
        raise ValueError(
            f"tx.{op} needs one row for each example in every leaf, got {given}: what all examples "
            "share is added afterwards"
        )
    return next(iter(rows))
