"""Watch jax's lowering, compiling and placing of arrays while there is a block.

jax is patched when the first block of any thread begins, and restored when the last one ends.
"""

import contextlib
import functools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from txcore import _compat
from txcore.profiling.audit import audit_compiled
from txcore.profiling.declared import source
from txcore.profiling.declared.collectives import is_one_shard_map
from txcore.profiling.declared.equations import Jaxpr
from txcore.profiling.dump import compile_and_dump
from txcore.profiling.gate.device_put import row_of_move
from txcore.profiling.gate.policy import (
    gate_context,
    raise_if_refused,
    raise_if_untraced,
    refused_origins,
)
from txcore.profiling.report import Report

_log = logging.getLogger("txcore.profiling.gate")


@contextlib.contextmanager
def refuse_in_block(origins: frozenset[str]) -> Iterator[None]:
    """Refuse these origins in this thread, in addition to those that it refuses already."""
    with _lock:
        entered = gate_context()
    together = tuple(sorted(origins | set(refused_origins())))
    with _watch_jax(), entered(together):
        yield


# The state that the blocks of all threads share: jax is patched while there is any block.
_lock = threading.Lock()
_blocks = 0
_said = False  # whether the warning of the disk cache was logged: once while there are blocks
_originals: dict[str, Any] = {}
_traced: "weakref.WeakKeyDictionary[Any, Jaxpr]" = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _watch_jax() -> Iterator[None]:
    global _blocks
    with _lock:
        if _blocks == 0:
            _patch_jax()
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                _restore_jax()


def _patch_jax() -> None:
    seams = _compat.compilation_seams()
    watchers: dict[str, Callable[..., Any]] = {
        "lower": _watch_lowering,
        "compile": _watch_compiling,
        "uses_disk_cache": _uses_disk_cache,
        "place": _watch_placing,
    }
    for what, (owner, name) in seams.items():
        original = getattr(owner, name)
        _originals[what] = original
        setattr(owner, name, functools.wraps(original)(_watch_in_blocks(watchers[what], original)))


def _restore_jax() -> None:
    global _said
    for what, (owner, name) in _compat.compilation_seams().items():
        setattr(owner, name, _originals.pop(what))
    _traced.clear()
    _said = False


def _watch_in_blocks(watch: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `original`, watched in the threads that are in a block."""

    def call_watched(*args: Any, **kwargs: Any) -> Any:
        if not refused_origins():
            return original(*args, **kwargs)
        return watch(original, *args, **kwargs)

    return call_watched


def _watch_lowering(original: Callable[..., Any], *args: Any, jaxpr: Jaxpr, **kwargs: Any) -> Any:
    lowered = original(*args, jaxpr=jaxpr, **kwargs)
    _traced[lowered] = _compat.plain_jaxpr(jaxpr)
    return lowered


def _watch_compiling(original: Callable[..., Any], lowered: Any, *args: Any, **kwargs: Any) -> Any:
    jaxpr = _traced.get(lowered)
    executable, early = _compile_once(original, lowered, jaxpr, *args, **kwargs)

    def read_partitioned() -> str:
        return early or _compile_with_partitioned(original, lowered, *args, **kwargs)[1]

    report = audit_compiled(_as_compiled(executable), jaxpr, partition=read_partitioned)
    name = _compat.lowered_name(lowered)
    raise_if_refused(
        report, f"compiling {name}, called at {source.user_source_line(_list_frames())},"
    )
    raise_if_untraced(report, name)
    return executable


def _compile_once(
    original: Callable[..., Any], lowered: Any, jaxpr: Jaxpr | None, *args: Any, **kwargs: Any
) -> tuple[Any, str]:
    """Compile, and keep the partitioned module where the partitioner had anything to decide."""
    if jaxpr is None or is_one_shard_map(jaxpr):
        return original(lowered, *args, **kwargs), ""
    return _compile_with_partitioned(original, lowered, *args, **kwargs)


def _compile_with_partitioned(
    original: Callable[..., Any], lowered: Any, compiler_options: Any = None, **kwargs: Any
) -> tuple[Any, str]:
    def compile_with(options: dict[str, Any]) -> Any:
        return original(lowered, compiler_options=options, **kwargs)

    return compile_and_dump(compile_with, compiler_options)


@dataclass(frozen=True)
class _Compiled:
    """The part of a `jax.stages.Compiled` that an audit reads; jax makes those only later."""

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


def _watch_placing(original: Callable[..., Any], x: Any, *, device: Any, **kwargs: Any) -> Any:
    row = row_of_move(x, device, source.user_source_line(_list_frames()))
    if row is not None:
        raise_if_refused(Report((row,), checked=False), "jax.device_put")
    return original(x, device=device, **kwargs)


def _list_frames() -> Iterator[tuple[str, int]]:
    """Yield (file, line) of the calls that led here, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
