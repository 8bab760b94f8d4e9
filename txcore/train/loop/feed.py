"""Read the batches of a run in order, from a position on."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from txcore.train.batches.placer import Placed
from txcore.train.checkpoints.manifest import Position
from txcore.train.loop.arguments import Length

Data = Iterable[Any] | Callable[[int], Iterable[Any]]


def read_batches(
    data: Data,
    length: Length,
    at: Position,
    place: Callable[[Any], Placed],
    rows_of: Callable[[Any], int],
) -> Iterator[tuple[Position, Placed]]:
    """Yield the batches of a run, from a position on, on the mesh.

    Each comes with the position after it.
    """
    first, steps, epochs = at.steps, length.steps, length.epochs
    last = math.inf if steps is None else steps
    while (epochs is None or at.epoch < epochs) and at.steps < last:
        before = at
        for host in _skip_done(data(at.epoch) if callable(data) else data, at, rows_of):
            if at.steps >= last:
                return
            batch = place(host)
            at = replace(at, steps=at.steps + 1, batch=at.batch + 1, rows=at.rows + batch.rows)
            yield at, batch
        if at.batch == 0:
            wanted = "another epoch" if steps is None else f"{steps - first} steps"
            raise ValueError(
                f"fit needs data for {wanted}, but the data ended after {before.steps - first} "
                "batches: pass a list of batches, or a function epoch -> batches, that can be read "
                "again"
            )
        at = replace(at, epoch=at.epoch + 1, batch=0, rows=0)


def _skip_done(data: Iterable[Any], at: Position, rows_of: Callable[[Any], int]) -> Iterator[Any]:
    """Read and drop the batches of an epoch that are done; return an iterator over the rest."""
    iterator = iter(data)
    dropped = [rows_of(batch) for batch in itertools.islice(iterator, at.batch)]
    if (len(dropped), sum(dropped)) != (at.batch, at.rows):
        raise ValueError(
            f"fit resumes epoch {at.epoch} after {at.batch} batches of {at.rows} examples, but "
            f"they are {len(dropped)} of {sum(dropped)} now: use the data and the global batch "
            "size that the checkpoint was made with"
        )
    return iterator
