"""The gate: a block of code in which nothing may be compiled that communicates unasked.

While a block is active, jax's own lowering, compiling and placing of arrays are watched
(`_compat.compilation_seams`). Each program that this thread compiles is audited against what was
traced for it, with the verdict of `audit`, before anyone gets it to run. What the block refuses is
part of jax's key for compiled programs, so that one compiled outside, or under a laxer gate, is
compiled anew.

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
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import jax

from txcore import _compat
from txcore.profiling.audit import AutoShardingError, audit_compiled
from txcore.profiling.declared import source
from txcore.profiling.declared.collectives import is_one_shard_map
from txcore.profiling.dump import dumping
from txcore.profiling.gate.device_put import row_of_move
from txcore.profiling.report import Collective, Report

P = ParamSpec("P")
R = TypeVar("R")

REFUSED = ("boundary", "partitioner", "reshard", "unknown")
_MOST_ROWS = 10

_log = logging.getLogger(__name__)


def no_auto_collectives(*, allow: Iterable[str] = ()) -> "Gate":
    """Refuse, within a block or a function, every program that communicates unasked.

    Holds for all that the calling thread compiles in the block: jitted functions, single
    operations on arrays, `lower(...).compile()`, also for targets. What was compiled before is
    traced and compiled anew, once for each set of refused origins. jax's compilation cache on
    disk is neither read nor written, which is logged where it would have been used.
    `jax.device_put` is refused where it sends a committed array's data between devices.

    Blocks nest: what any of them refuses is refused. As a decorator it guards each call. It belongs
    to one thread from beginning to end, as jax's own contexts do: do not `await` or `yield` in it.

    Args:
      allow: origins of `Collective.origin` to let through, of "partitioner", "boundary" (a reshard
        at a shard_map or jit edge), "reshard" (asked for by name, `device_put` too) and "unknown".
        "txcore", "user", "autodiff" and "opaque" are never refused.

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
    if isinstance(allow, str) or not isinstance(allow, Iterable):
        raise TypeError(
            f"allow needs a set of origins, but got {allow!r}: write allow={{'reshard'}}"
        )
    allowed = tuple(allow)
    if unknown := [name for name in allowed if name not in REFUSED]:
        raise ValueError(
            f"allow needs origins that the gate refuses, of {', '.join(REFUSED)}, but got "
            f"{', '.join(map(repr, unknown))}: leave it out (txcore, user, autodiff and opaque "
            "are never refused)"
        )
    return Gate(frozenset(REFUSED) - frozenset(allowed))


@dataclass(frozen=True)
class Gate:
    """A context manager and decorator; `refused` are the origins that it does not let through."""

    refused: frozenset[str]

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
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            with _block(self.refused):
                return function(*args, **kwargs)

        return guarded

    def __enter__(self) -> None:
        block = _block(self.refused)
        block.__enter__()
        _entered().append(block)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return _entered().pop().__exit__(kind, error, trace)


_thread = threading.local()


def _entered() -> list[Any]:
    """Return the blocks that this thread has entered by `with`, outermost first."""
    if not hasattr(_thread, "entered"):
        _thread.entered = []
    return _thread.entered


@functools.cache
def _context() -> Any:
    """Return jax's context that holds what this thread's blocks refuse: part of all jax's keys."""
    # Made by the first gate, not by the import: it makes jax trace everything once more.
    return jax.make_user_context(())


def _refused() -> tuple[str, ...]:
    return _context().value


@contextlib.contextmanager
def _block(refused: frozenset[str]) -> Iterator[None]:
    with _lock:
        context = _context()
    together = tuple(sorted(refused | set(_refused())))
    with _watched(), context(together):
        yield


# What the blocks of all threads share: jax is patched while there is any.
_lock = threading.Lock()
_blocks = 0
_said = False  # that the disk cache is not used: once while there are blocks
_originals: dict[str, Any] = {}
_traced: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    global _blocks
    with _lock:
        if _blocks == 0:
            _patch()
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                _restore()


def _patch() -> None:
    seams = _compat.compilation_seams()
    watchers: dict[str, Callable[..., Any]] = {
        "lower": _lower,
        "compile": _compile,
        "uses_disk_cache": _uses_disk_cache,
        "place": _place,
    }
    for what, (owner, name) in seams.items():
        original = getattr(owner, name)
        _originals[what] = original
        setattr(owner, name, functools.wraps(original)(_watcher(watchers[what], original)))


def _restore() -> None:
    global _said
    for what, (owner, name) in _compat.compilation_seams().items():
        setattr(owner, name, _originals.pop(what))
    _traced.clear()
    _said = False


def _watcher(watch: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `original`, watched in the threads that are in a block."""

    def watched(*args: Any, **kwargs: Any) -> Any:
        if not _refused():
            return original(*args, **kwargs)
        return watch(original, *args, **kwargs)

    return watched


def _lower(original: Callable[..., Any], *args: Any, jaxpr: Any, **kwargs: Any) -> Any:
    lowered = original(*args, jaxpr=jaxpr, **kwargs)
    _traced[lowered] = _compat.plain_jaxpr(jaxpr)
    return lowered


def _compile(original: Callable[..., Any], lowered: Any, *args: Any, **kwargs: Any) -> Any:
    jaxpr = _traced.get(lowered)
    executable, early = _compile_once(original, lowered, jaxpr, *args, **kwargs)

    def partition() -> str:
        return early or _with_partitioned(original, lowered, *args, **kwargs)[1]

    report = audit_compiled(_as_compiled(executable), jaxpr, partition=partition)
    name = _compat.lowered_name(lowered)
    _refuse(report, f"compiling {name}, called at {source.shorten(_frames())},")
    _refuse_untraced(report, name)
    return executable


def _compile_once(
    original: Callable[..., Any], lowered: Any, jaxpr: Any, *args: Any, **kwargs: Any
) -> tuple[Any, str]:
    """Compile, and keep the partitioned module where the partitioner had anything to decide."""
    if jaxpr is None or is_one_shard_map(jaxpr):
        return original(lowered, *args, **kwargs), ""
    return _with_partitioned(original, lowered, *args, **kwargs)


def _with_partitioned(
    original: Callable[..., Any], lowered: Any, compiler_options: Any = None, **kwargs: Any
) -> tuple[Any, str]:
    def compile_(options: dict[str, Any]) -> Any:
        return original(lowered, compiler_options=options, **kwargs)

    return dumping(compile_, compiler_options)


@dataclass(frozen=True)
class _Compiled:
    """What an audit reads of a `jax.stages.Compiled`, which jax makes only after compiling."""

    text: str
    input_shardings: Any
    output_shardings: Any

    def as_text(self) -> str:
        return self.text


def _as_compiled(executable: Any) -> Any:
    return _Compiled(executable.as_text() or "", *_compat.executable_shardings(executable))


def _uses_disk_cache(original: Callable[..., bool], backend: Any) -> bool:
    global _said
    if original(backend) and _compat.setting("jax_compilation_cache_dir") and not _said:
        _said = True
        _log.warning(
            "no_auto_collectives compiles without jax's compilation cache on disk (%s): it is "
            "neither read nor written inside of the block",
            _compat.setting("jax_compilation_cache_dir"),
        )
    return False


def _place(original: Callable[..., Any], x: Any, *, device: Any, **kwargs: Any) -> Any:
    row = row_of_move(x, device, source.shorten(_frames()))
    if row is not None:
        _refuse(Report((row,), checked=False), "jax.device_put")
    return original(x, device=device, **kwargs)


def _frames() -> Iterator[tuple[str, int]]:
    """Yield (file, line) of the calls that led here, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]


def _refuse(report: Report, doing: str) -> None:
    """Raise where a report has rows whose origin this thread's blocks refuse."""
    rows = tuple(row for row in report.collectives if _origin(row) in _refused())
    if rows:
        raise _error(report, _text(rows, doing))


def _refuse_untraced(report: Report, name: str) -> None:
    """Raise where nothing can tell the author's collectives from the partitioner's."""
    if report.checked or not report.collectives or _compat.marks_partitioner():
        return
    if "partitioner" in _refused():
        raise _error(
            report,
            f"no_auto_collectives needs the traced program of {name} to tell its author's "
            f"collectives from the partitioner's, which jax {jax.__version__} does not mark, but "
            "it was lowered outside of the block: lower it inside",
        )


def _error(report: Report, text: str) -> AutoShardingError:
    error = AutoShardingError(report)
    error.args = (text,)
    return error


def _origin(row: Collective) -> str:
    """Return a row's origin; what nothing declares is the partitioner's, whatever its line says."""
    return row.origin if row.explained or row.origin in REFUSED else "partitioner"


def _text(rows: tuple[Collective, ...], doing: str) -> str:
    from txcore.profiling.report.table import table  # tabulate, which importing must not cost

    more = len(rows) - _MOST_ROWS
    named = [f"  {row.op or row.kind}: {row.op_name or row.note}" for row in rows[:_MOST_ROWS]]
    origins = sorted({_origin(row) for row in rows})
    return "\n".join(
        [
            f"no_auto_collectives required that nobody communicates unasked, but {doing} adds "
            f"{len(rows)}:",
            *table(rows[:_MOST_ROWS]),
            *named,
            *([f"  and {more} more"] if more > 0 else []),
            "write the communication out (jax.shard_map with txcore's collectives), give the "
            "arguments and results the shardings that the program wants, or let it through: "
            f"no_auto_collectives(allow={{{', '.join(map(repr, origins))}}})",
        ]
    )
