"""The gate: a block of code in which nothing may be compiled that communicates unasked.

While a block is active, the gate watches jax's lowering, compiling and placing of arrays
(`_compat.compilation_seams`). It audits each program that this thread compiles against its traced
program, as `audit` does, before the program runs. The refused origins are part of jax's key for
compiled programs, so that a program compiled outside, or under a laxer gate, is compiled anew.

| jax   | what the gate cannot tell                                                            |
|-------|--------------------------------------------------------------------------------------|
| all   | an already compiled `jax.stages.Compiled` that is called: nothing is compiled. Audit it |
| all   | threads that the block starts: a gate holds for its own thread                        |
| all   | arrays fetched to the host (`numpy.asarray`), and uncommitted ones that are placed    |

A program that was lowered before the block comes without its traced one. Then the partitioner's
mark decides; jax 0.10 has none, so there the gate refuses such a program if it communicates at all.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar

from txcore.profiling.gate.hooks import watch_in_block
from txcore.profiling.gate.policy import (
    REFUSED,
    Collection,
    Refusal,
    begin_collecting,
    warn_of_collected,
)
from txcore.profiling.gate.watches import watches_of_thread
from txcore.profiling.report.report import check_allowed

P = ParamSpec("P")
R = TypeVar("R")
Mode = Literal["raise", "warn"]
_MODES = ("raise", "warn")


def no_auto_collectives(*, allow: Iterable[str] = (), mode: Mode = "raise") -> "Gate":
    """Refuse, within a block or a function, every program that communicates unasked.

    The gate checks all that the calling thread compiles in the block: jitted functions, single
    operations on arrays, `lower(...).compile()`, also for targets. Programs compiled before are
    traced and compiled anew, once for each set of refused origins. The gate bypasses jax's
    compilation cache on disk, and logs where it would have been used. It refuses a
    `jax.device_put` that sends a committed array's data between devices.

    With `mode="warn"` nothing is refused: the outermost such block of a thread warns once, at its
    end, of all that would have been.

    Blocks nest: an origin is refused where any of them refuses it. As a decorator the gate guards
    each call. It belongs to one thread from beginning to end, as jax's own contexts do: do not
    `await` or `yield` in it.

    Args:
      allow: origins of `Collective.origin` to let through, of "partitioner", "boundary" (a reshard
        at a shard_map or jit edge), "reshard" (asked for by name, `device_put` too) and "unknown".
        "txcore", "user", "autodiff" and "opaque" are never refused.
      mode: "raise" refuses, from the call that compiles; "warn" collects, and gives one warning
        (a UserWarning) at the end of the block.

    Returns:
      The gate, a context manager and decorator that can be used any number of times.

    Raises:
      AutoShardingError: inside of the block, from the call that compiles (or places) it; its
        `report` has all the program's collectives.
      TypeError: `allow` is no set of names; a generator or coroutine function is decorated.
      ValueError: `allow` names something that is not refused.
      RuntimeError: this jax's compilation cannot be watched.

    Example:
      >>> import jax.numpy as jnp
      >>> with no_auto_collectives():
      ...     print(jnp.arange(4).sum())
      6
    """
    allowed = check_allowed(allow, known=REFUSED)
    if mode not in _MODES:
        raise ValueError(
            f"mode needs to be one of {', '.join(map(repr, _MODES))}, but got {mode!r}"
        )
    return Gate(frozenset(REFUSED) - allowed, mode)


@dataclass(frozen=True)
class Gate:
    """A context manager and decorator.

    Attributes:
      refused: the origins that it does not let through.
      mode: "raise" or "warn".
    """

    refused: frozenset[str]
    mode: Mode = "raise"

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return the function with each of its calls in a block of its own."""
        kinds = (
            inspect.isgeneratorfunction,
            inspect.iscoroutinefunction,
            inspect.isasyncgenfunction,
        )
        if not callable(function) or any(is_one(function) for is_one in kinds):
            raise TypeError(
                "no_auto_collectives guards a function from its call to its return, but got "
                f"{function!r}: write 'with no_auto_collectives():' around the calls inside it"
            )

        @functools.wraps(function)
        def call_guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            with guard_block(self.refused, self.mode):
                return function(*args, **kwargs)

        return call_guarded

    def __enter__(self) -> None:
        entered = guard_block(self.refused, self.mode)
        entered.__enter__()
        _entered_blocks().append(entered)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return _entered_blocks().pop().__exit__(kind, error, trace)


_thread = threading.local()


def _entered_blocks() -> list[Any]:
    """Return the blocks that this thread has entered by `with`, outermost first."""
    if not hasattr(_thread, "entered"):
        _thread.entered = []
    return _thread.entered


@contextlib.contextmanager
def guard_block(origins: frozenset[str], mode: Mode) -> Iterator[None]:
    """Refuse or collect these origins in this thread, with those of the blocks around."""
    kind = Refusal if mode == "raise" else Collection
    outer = watches_of_thread()
    merged = origins.union(*(watch.origins for watch in outer if isinstance(watch, kind)))
    others = (watch for watch in outer if not isinstance(watch, kind))
    is_outermost = mode == "warn" and begin_collecting()
    try:
        with watch_in_block(*others, kind(tuple(sorted(merged)))):
            yield
    finally:
        if is_outermost:
            warn_of_collected(stacklevel=5)
