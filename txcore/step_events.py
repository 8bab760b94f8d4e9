"""Who is told of an engine's steps while they run: a profile, where one is active. Ground floor."""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class Listener(Protocol):
    """One who is told."""

    def step(self, program: Any = None) -> contextlib.AbstractContextManager[None]:
        """Return a context for the dispatch of a step."""

    def input(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for the time that a loop waits for its next batch."""

    def compiler_options(self, platform: str) -> dict[str, Any]:
        """Return what steps are compiled with for this platform while it listens."""


listener: Listener | None = None


def during_step(program: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context for the dispatch of a step of an engine; without a listener an empty one."""
    return _NOTHING if listener is None else listener.step(program)


def told_of(batches: Iterator[T]) -> Iterator[T]:
    """Yield the batches; tell the listener how long each one took to come."""
    while True:
        with _NOTHING if listener is None else listener.input():
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch
