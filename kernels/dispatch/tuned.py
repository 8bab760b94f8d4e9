"""What was measured: which implementation and configuration is the fastest for a class."""

import dataclasses
import functools
import os
import pathlib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.dispatch.tuning_file import Entry, TuningError, read

_READ: dict[str, tuple[tuple[int, int, int] | None, dict[str, Entry]]] = {}


def cache_path() -> str | None:
    """Return the user's tuning file; None where there is to be none.

    It is $TXCORE_TUNING, where that is set (empty for none), and else txcore/tuning.json in the
    user's cache folder ($XDG_CACHE_HOME, or ~/.cache).
    """
    named = os.environ.get("TXCORE_TUNING")
    if named is not None:
        return named or None
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # the XDG specification: a relative one is to be ignored
        folder = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(folder, "txcore", "tuning.json")


def lookup(problem: Problem) -> Iterator[tuple[str, Entry]]:
    """Yield what is known of a problem's class, the user's file first, then what is recorded.

    An entry is a hint, also one of another jax version or machine: it is used wherever it can
    run. The processes of one program need the same entries, or they compile different programs:
    give all of them one file.

    Args:
      problem: what is to be computed, and where.

    Yields:
      Where an entry comes from (a path, or "recorded"), and the entry.

    Raises:
      TuningError: the user's file cannot be used.
    """
    path = cache_path()
    for source, entries in (
        *(((path, _read_once(path)),) if path is not None else ()),
        ("recorded", recorded(problem.platform)),
    ):
        if problem.key in entries:
            yield source, entries[problem.key]


def _read_once(path: str) -> Mapping[str, Entry]:
    try:
        status = os.stat(path)
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
    except OSError:
        stamp = None
    if path not in _READ or _READ[path][0] != stamp:
        _READ[path] = (stamp, read(path))
    return _READ[path][1]


@functools.cache
def recorded(platform: str) -> Mapping[str, Entry]:
    """Return the entries that come with txcore for a platform's devices, by `Problem.key`."""
    return read(pathlib.Path(__file__).with_name("recorded") / f"{platform}.json")


def config_of(guess: Any, key: str, source: str, entry: Entry) -> Any:
    """Return an entry's configuration as the implementation's own class.

    Args:
      guess: a configuration of the implementation, or None where it has none.
      key: the entry's.
      source: where it comes from.
      entry: what was measured.

    Returns:
      A configuration of the class of `guess`, or None.

    Raises:
      TuningError: the class has other fields now, or does not take these values.
    """
    hints = {} if guess is None else typing.get_type_hints(type(guess))
    reason = "other fields or types"
    if set(entry.config) == set(hints) and all(
        _is_a(value, hints[name]) for name, value in entry.config.items()
    ):
        try:
            return None if guess is None else type(guess)(**entry.config)
        except ValueError as error:
            reason = str(error)
    wanted = ", ".join(f"{name}: {_spell(hint)}" for name, hint in hints.items()) or "no field"
    op = key.partition("|")[0]
    raise TuningError(
        f"{op}: the configuration of {entry.implementation!r} for {key!r} must have {wanted}; got "
        f"{dict(entry.config)} in {source} ({reason}). Run `txcore tune {op}` to measure anew, or "
        "delete the file."
    )


def _is_a(value: Any, hint: Any) -> bool:
    """Tell whether a value has an annotated type; True is no integer here."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_is_a(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return any(type(value) is type(one) and value == one for one in typing.get_args(hint))
    return type(value) is hint


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def fields_of(config: Any) -> dict[str, Any]:
    """Return a configuration's fields as an entry holds them, {} of None."""
    return {} if config is None else dataclasses.asdict(config)
