"""The measured choices: the fastest implementation and configuration for a class of problems."""

import dataclasses
import functools
import os
import pathlib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.dispatch.tuning_file import Entry, TuningError, read_entries

_READ: dict[str, tuple[tuple[int, int, int] | None, dict[str, Entry]]] = {}


def cache_path() -> str | None:
    """Return the path of the user's tuning file, or None for no file.

    It is $TXCORE_TUNING where that is set (empty for no file), else txcore/tuning.json in the
    user's cache folder ($XDG_CACHE_HOME, or ~/.cache).
    """
    named = os.environ.get("TXCORE_TUNING")
    if named is not None:
        return named or None
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # the XDG specification: ignore a relative path
        folder = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(folder, "txcore", "tuning.json")


def find_entries(problem: Problem) -> Iterator[tuple[str, Entry]]:
    """Yield the entries for a problem's class: the user's first, then those that txcore brings.

    An entry is a hint. It is used wherever it can run, even if another jax version or machine
    measured it. The processes of one run need the same entries, or they compile different
    programs: give all of them one file.

    Args:
      problem: what to compute, and where.

    Yields:
      Where an entry comes from (a path, or "recorded"), and the entry.

    Raises:
      TuningError: the user's file cannot be used.
    """
    path = cache_path()
    for source, entries in (
        *(((path, _read_once(path)),) if path is not None else ()),
        ("recorded", read_recorded(problem.platform)),
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
        _READ[path] = (stamp, read_entries(path))
    return _READ[path][1]


@functools.cache
def read_recorded(platform: str) -> Mapping[str, Entry]:
    """Return the entries that come with txcore for a platform's devices, by `Problem.key`."""
    return read_entries(pathlib.Path(__file__).with_name("recorded") / f"{platform}.json")


def config_of(guess: Any, key: str, source: str, entry: Entry) -> Any:
    """Return an entry's configuration as the implementation's own class.

    Args:
      guess: a configuration of the implementation, or None where it has none.
      key: the entry's key, for the error.
      source: where the entry comes from, for the error.
      entry: the measured choice.

    Returns:
      A configuration of the class of `guess`, or None.

    Raises:
      TuningError: the class has other fields, or does not take these values.
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
    wanted = ", ".join(f"{name}: {_name_type(hint)}" for name, hint in hints.items()) or "no field"
    op = key.partition("|")[0]
    raise TuningError(
        f"{op}: the configuration of {entry.implementation!r} for {key!r} needs {wanted}, got "
        f"{dict(entry.config)} in {source} ({reason}): run `txcore tune {op}` to measure again, or "
        "delete the file"
    )


def _is_a(value: Any, hint: Any) -> bool:
    """Tell whether a value has an annotated type; here True is not an integer."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_is_a(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return any(type(value) is type(one) and value == one for one in typing.get_args(hint))
    return type(value) is hint


def _name_type(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def fields_of(config: Any) -> dict[str, Any]:
    """Return a configuration's fields as an entry holds them: {} for None."""
    return {} if config is None else dataclasses.asdict(config)
