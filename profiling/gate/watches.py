"""What is told of each program that jax compiles: the watches of a thread, and of the process.

A thread's watches are part of jax's key for compiled programs, so that a program that was compiled
outside of a block, or under other watches, is compiled anew inside. Those of the process are not:
they begin before anything is compiled.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from txcore.profiling.report import Collective, Report


@dataclass(frozen=True)
class Compilation:
    """A program that was just compiled, before it runs.

    Attributes:
      name: "jit(step)".
      called_at: "train.py:12", the innermost line outside jax and txcore, relative to the working
        folder where it lies below it.
      report: its audit.
      devices: how many it runs on.
      processes: how many processes they belong to.
      options: the compiler options that it was compiled with.
      text: its optimized module.
    """

    name: str
    called_at: str
    report: Report
    devices: int = 1
    processes: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


class Watch(Protocol):
    """Hashable: equal ones share their compiled programs."""

    def see_program(self, program: Compilation) -> None:
        """Take note of a program; raise to keep it from running."""

    def see_move(self, row: Callable[[], Collective | None]) -> None:
        """Take note of a `jax.device_put`; `row` describes what it sends, None for nothing."""


class Onlooker(Watch, Protocol):
    """A watch of the whole process, which only looks on."""

    def see_failure(self, name: str, error: Exception) -> None:
        """Take note of a program that could not be audited."""


everywhere: list[Onlooker] = []  # of all threads of this process


@functools.cache
def thread_context() -> Any:
    """Return jax's context that holds this thread's watches: part of all jax's keys."""
    # The first block makes it, not the import: a new context makes jax trace everything once more.
    return jax.make_user_context(())


def watches_of_thread() -> tuple[Any, ...]:
    """Return the watches of this thread's blocks, () outside of any."""
    return thread_context().value if thread_context.cache_info().currsize else ()


def active_watches() -> tuple[Any, ...]:
    """Return all that are to be told of what this thread compiles."""
    return (*watches_of_thread(), *everywhere)
