"""Read the batches of a run in order, from a position on."""

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import jax

from txcore.train.batches.placer import Copied, Placed, Stacked
from txcore.train.checkpoints.manifest import Position
from txcore.train.loop.arguments import Length

Data = Iterable[Any] | Callable[[int], Iterable[Any]]


class Rows(Protocol):
    """What is known of a batch that was made ready: how many rows the global batch has."""

    @property
    def rows(self) -> int:
        """The rows of the global batch."""


Ready = TypeVar("Ready", bound=Rows)
# What `read_batches` yields: a batch with the position after it, or a function that begins an
# epoch, whose result it is to be sent.
Begin = Callable[[], Iterable[Any]]
Reading = Generator[tuple[Position, Ready] | Begin, Iterable[Any] | None, None]


def read_batches(
    data: Data,
    length: Length,
    at: Position,
    make_ready: Callable[[Any], Ready],
    rows_of: Callable[[Any], int],
) -> Reading[Ready]:
    """Yield the batches of a run, from a position on, each with the position after it.

    Before the batches of an epoch it yields the function that begins it: whoever reads decides on
    which thread, and sends what it returns.

    Args:
      data: as for `fit`.
      length: of the run. No batch beyond it is read.
      at: the position.
      make_ready: makes a batch ready for a step.
      rows_of: returns the rows of the global batch of which a batch is (this process's part).

    Raises:
      ValueError: the data end too early, or are not those that the position was reached with.
    """
    first, steps, epochs = at.steps, length.steps, length.epochs
    last = math.inf if steps is None else steps
    while (epochs is None or at.epoch < epochs) and at.steps < last:
        before = at
        batches = yield partial(_begin_epoch, data, at.epoch)
        assert batches is not None
        for host in _skip_done(batches, at, rows_of):
            batch = make_ready(host)
            at = Position(at.steps + 1, at.epoch, at.batch + 1, at.rows + batch.rows)
            yield at, batch
            if at.steps >= last:
                return
        if at.batch == 0:
            wanted = "another epoch" if steps is None else f"{steps - first} steps"
            raise ValueError(
                f"fit needs data for {wanted}, but the data ended after {before.steps - first} "
                "batches: pass a list of batches, or a function epoch -> batches, that can be read "
                "again"
            )
        at = replace(at, epoch=at.epoch + 1, batch=0, rows=0)


def group_steps(
    batches: Reading[Copied],
    steps: int,
    stack: Callable[[list[Any]], Stacked | None],
    place: Callable[[Any], Placed],
) -> Generator[tuple[Position, Placed | Stacked] | Begin, Iterable[Any] | None, None]:
    """Yield batches placed in groups of as many as there are steps in a program.

    A group ends at a multiple of `steps` of the run. What is no whole group (at the end, after
    resuming elsewhere, before an error of the data), or not alike, comes one by one.

    Args:
      batches: what `read_batches` returned, of batches on the host.
      steps: the size of a group.
      stack: places a group as one.
      place: places one.
    """
    group: list[tuple[Position, Copied]] = []
    given = None
    with closing(batches):
        while True:
            try:
                item = batches.send(given)
            except StopIteration:
                break
            except Exception:
                yield from _place_each(group, place)
                raise
            given = None
            if not isinstance(item, tuple):
                given = yield item
                continue
            group.append(item)
            after = item[0]
            if after.steps % steps:
                continue
            stacked = stack([copied.tree for _, copied in group]) if len(group) == steps else None
            if stacked is None:
                yield from _place_each(group, place)
            else:
                yield after, stacked
            group = []
        yield from _place_each(group, place)


def _place_each(
    group: list[tuple[Position, Copied]], place: Callable[[Any], Placed]
) -> Iterator[tuple[Position, Placed]]:
    for after, copied in group:
        yield after, place(copied.tree)


def _begin_epoch(data: Data, epoch: int) -> Iterable[Any]:
    return data(epoch) if callable(data) else data


def lies_on_devices(data: Data) -> bool:
    """Tell whether data are a list of batches of jax's arrays: nothing is read, cut or sent."""
    if not isinstance(data, list | tuple) or not data:
        return False
    return all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(data[0]))


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
