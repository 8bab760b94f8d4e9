"""Watch jax's lowering, compiling and placing of arrays, for a block or for the whole process.

jax is patched when the first watch of any thread begins, and restored when the last one ends.
"""

import contextlib
import functools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from txcore import _compat
from txcore.profiling.audit import audit_compiled
from txcore.profiling.declared import source
from txcore.profiling.declared.equations import Jaxpr, is_one_shard_map
from txcore.profiling.dump import compile_and_dump
from txcore.profiling.gate import watches
from txcore.profiling.gate.device_put import row_of_move
from txcore.profiling.gate.watches import Compilation, Onlooker, Watch, active_watches
from txcore.profiling.program import machine_of
from txcore.profiling.report import Collective, Report

# Words without which a module of one device has nothing to account for: most small ones.
_COMMUNICATES = ("all-", "scatter", "collective", "custom-call", "send", "recv", "-start")
_log = logging.getLogger("txcore.profiling.gate")


@contextlib.contextmanager
def watch_in_block(*together: Watch) -> Iterator[None]:
    """Tell these watches, and no others of this thread, what it compiles and places in a block."""
    with _lock:
        entered = watches.thread_context()
    _begin_watching()
    try:
        with entered(together):
            yield
    finally:
        _end_watching()


def watch_process(watch: Onlooker) -> None:
    """Tell a watch all that any thread of this process compiles and places from now on."""
    _begin_watching()
    watches.everywhere.append(watch)


# The state that the watches of all threads share: jax is patched while there is any.
_lock = threading.Lock()
_blocks = 0
_said = False  # whether the warning of the disk cache was logged: once while there are watches
_originals: dict[str, Any] = {}
_traced: "weakref.WeakKeyDictionary[Any, Jaxpr]" = weakref.WeakKeyDictionary()
# The watches that have seen a lowered program without other options, and what it compiled to.
_compiled: "weakref.WeakKeyDictionary[Any, tuple[tuple[Watch, ...], Any]]"
_compiled = weakref.WeakKeyDictionary()


def _begin_watching() -> None:
    global _blocks
    with _lock:
        if _blocks == 0:
            _patch_jax()
        _blocks += 1


def _end_watching() -> None:
    global _blocks
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
        setattr(owner, name, functools.wraps(original)(_watch_if_any(watchers[what], original)))


def _restore_jax() -> None:
    global _said
    for what, (owner, name) in _compat.compilation_seams().items():
        setattr(owner, name, _originals.pop(what))
    _traced.clear()
    _compiled.clear()
    _said = False


def _watch_if_any(watch: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `original`, watched in the threads that have watches."""

    def call_watched(*args: Any, **kwargs: Any) -> Any:
        if not active_watches():
            return original(*args, **kwargs)
        return watch(original, *args, **kwargs)

    return call_watched


def _watch_lowering(original: Callable[..., Any], *args: Any, jaxpr: Jaxpr, **kwargs: Any) -> Any:
    lowered = original(*args, jaxpr=jaxpr, **kwargs)
    _traced[lowered] = _compat.plain_jaxpr(jaxpr)
    return lowered


def _watch_compiling(original: Callable[..., Any], lowered: Any, *args: Any, **kwargs: Any) -> Any:
    told, plain = active_watches(), not any((*args, *kwargs.values()))
    before = _compiled.get(lowered) if plain else None
    if before is not None and before[0] == told:  # some calls ask each time: those with effects
        return before[1]
    jaxpr = _traced.get(lowered)
    with _compat.compiling_watched():
        executable, early = _compile_once(original, lowered, jaxpr, *args, **kwargs)

    def read_partitioned() -> str:
        with _compat.compiling_watched():
            return early or _compile_with_partitioned(original, lowered, *args, **kwargs)[1]

    compiled, devices = _as_compiled(executable), _compat.lowered_devices(lowered)
    try:
        if len(devices) == 1 and not any(word in compiled.text for word in _COMMUNICATES):
            report = Report((), checked=jaxpr is not None, target=machine_of(compiled))
        else:
            report = audit_compiled(compiled, jaxpr, partition=read_partitioned)
    except Exception as error:
        if watches.watches_of_thread():
            raise
        for watch in watches.everywhere:  # they only look on: a program runs as it would
            watch.see_failure(_compat.lowered_name(lowered), error)
        return executable
    program = Compilation(
        _compat.lowered_name(lowered),
        source.user_place(_list_frames()),
        report,
        devices=len(devices),
        processes=len({device.process_index for device in devices}),
        options=_compat.lowered_options(lowered, *args, **kwargs),
        text=compiled.as_text(),
    )
    for watch in told:
        watch.see_program(program)
    if plain:
        _compiled[lowered] = told, executable
    return executable


def _compile_once(
    original: Callable[..., Any], lowered: Any, jaxpr: Jaxpr | None, *args: Any, **kwargs: Any
) -> tuple[Any, str]:
    """Compile, and keep the partitioned module where the partitioner had anything to decide."""
    alone = len(_compat.lowered_devices(lowered)) == 1
    if alone or jaxpr is None or is_one_shard_map(jaxpr):
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
            "jax's compilation cache on disk (%s) is neither read nor written while txcore watches "
            "what is compiled",
            _compat.setting("jax_compilation_cache_dir"),
        )
    return False


def _watch_placing(original: Callable[..., Any], x: Any, *, device: Any, **kwargs: Any) -> Any:
    @functools.cache
    def row() -> Collective | None:
        moved = row_of_move(x, device, "")
        return moved and replace(moved, source=source.user_source_line(_list_frames()))

    for watch in active_watches():
        watch.see_move(row)
    return original(x, device=device, **kwargs)


def _list_frames() -> Iterator[tuple[str, int]]:
    """Yield (file, line) of the calls that led here, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
