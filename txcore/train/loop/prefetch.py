"""Read the batches to come on a thread, while the step runs."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import Any

from txcore import _compat
from txcore.train.checkpoints.manifest import Position
from txcore.train.loop.feed import Reading, Ready

ENDS_S = 10.0  # for the data to come back from one batch, once the run has ended

_LOG = logging.getLogger("txcore")

# What the thread says in place of a batch, and what wakes the reader.
_END, _NOT_HERE, _WAKE = object(), object(), object()


class Reader:
    """Iterate over the batches of a run; a thread reads the next ones meanwhile.

    The thread reads, cuts, casts and sends at most `ahead` batches that were not asked for yet. An
    exception of the data surfaces where the batch would have, with the frames of the thread in its
    traceback. jax's contexts hold for one thread: inside of one (`jax.enable_x64`) the batches are
    read where they are asked for, as with `ahead=0`.

    Args:
      batches: what `read_batches` returned.
      ahead: how many batches to read ahead; with 0 there is no thread.
      begins_here: whether the calling thread begins each epoch, and no batch of the next one is
        read before that. Ranks that exchange anything there do so in one order.
      should_end: asked after `wake`: whether to end the iteration, though there are batches left.
    """

    def __init__(
        self,
        batches: Reading[Ready],
        ahead: int,
        *,
        begins_here: bool = False,
        should_end: Callable[[], bool] = lambda: False,
    ) -> None:
        self._batches, self._should_end = batches, should_end
        self._begins_here = begins_here
        self._ready: SimpleQueue[Any] = SimpleQueue()
        self._slots: SimpleQueue[None] = SimpleQueue()  # one for each batch that may be read
        self._begun: SimpleQueue[Any] = SimpleQueue()
        self._closed = False
        self._thread: threading.Thread | None = None
        if ahead:
            self._settings = _compat.thread_settings()
            for _ in range(ahead):
                self._slots.put(None)
            self._thread = threading.Thread(
                target=self._read_all, name="txcore-prefetch", daemon=True
            )
            self._thread.start()

    def __iter__(self) -> Iterator[tuple[Position, Any]]:
        return _read_here(self._batches) if self._thread is None else self._take_all()

    def _take_all(self) -> Iterator[tuple[Position, Any]]:
        while True:
            item, error = self._ready.get()
            if error is not None:
                raise error
            if item is _END or (item is _WAKE and self._should_end()):
                return
            if item is _NOT_HERE:
                yield from _read_here(self._batches)
                return
            if callable(item):
                self._begun.put(item())
            elif item is not _WAKE:
                self._slots.put(None)
                yield item

    def wake(self) -> None:
        """Have whoever waits for a batch ask `should_end`; a signal handler may call it."""
        self._ready.put((_WAKE, None))

    def close(self) -> None:
        """Drop what was read ahead, and end the thread.

        A thread is only ever ended between two batches: where the data do not return one in time,
        it is left to end by itself, with a warning.
        """
        self._closed = True
        if self._thread is not None:
            self._slots.put(None)
            self._begun.put(None)
            self._thread.join(ENDS_S)
        if self._thread is None or not self._thread.is_alive():
            self._batches.close()
        else:
            _LOG.warning(
                "txcore: fit has ended, and the data have not returned the batch that was asked of "
                "them for %g s: the thread txcore-prefetch ends when they do",
                ENDS_S,
            )

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_all(self) -> None:
        """Read until the end, an error, or `close`."""
        try:
            if _compat.thread_settings() != self._settings:
                self._ready.put((_NOT_HERE, None))
                return
            with closing(self._batches):
                self._read_while_open()
        except BaseException as error:  # whatever it is, it is the caller's
            self._ready.put((None, error))

    def _read_while_open(self) -> None:
        given = None
        while True:
            self._slots.get()
            if self._closed:
                return
            try:
                item = self._batches.send(given)
                while callable(item) and not self._begins_here:
                    item = self._batches.send(item())
            except StopIteration:
                self._ready.put((_END, None))
                return
            self._ready.put((item, None))
            given = None
            if callable(item):
                given = self._begun.get()
                self._slots.put(None)  # it was no batch


def _read_here(batches: Reading[Ready]) -> Iterator[tuple[Position, Ready]]:
    """Read on the calling thread."""
    with closing(batches):
        for item in batches:
            while not isinstance(item, tuple):
                try:
                    item = batches.send(item())
                except StopIteration:
                    return
            yield item
