"""The lock file's text: canonical JSON with one entry a line, so that its diffs can be reviewed."""

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from txcore.profiling.lock.model import Entry, Lock, LockError

_FORMAT = "txcore-lock"
_VERSION = 1
_MOST_BYTES = 1 << 24
_FIELDS: dict[str, type] = {
    **{"tag": str, "source": str, "kind": str, "axes": list, "dtype": str},
    **{"payload_bytes": int, "trips": int, "trips_known": bool, "origin": str},
}
_MAY_LACK = {"tag", "source", "trips_known"}
_MOST_DIGITS = 18


def read(path: str | os.PathLike[str], *, max_bytes: int = _MOST_BYTES) -> dict[str, Lock]:
    """Read a lock file.

    Args:
      path: the file.
      max_bytes: the longest file to read, 16 MiB by default.

    Returns:
      Its locks by target.

    Raises:
      LockError: there is no such file, or it is no lock file of this version.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise LockError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > max_bytes:
        raise LockError(f"{path} is longer than {max_bytes} bytes: that is no lock file")
    try:
        return loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise LockError(f"{path} {_reason(error)}: restore it, or delete and update it") from error


def _reason(error: Exception) -> str:
    if isinstance(error, LockError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return "is not text"
    return f"is not JSON ({error})"


def loads(text: str) -> dict[str, Lock]:
    """Return the locks in a lock file's text, by target."""
    data = json.loads(
        text, object_pairs_hook=_each_once, parse_int=_short, parse_constant=_no_number
    )
    if not (isinstance(data, dict) and data.get("format") == _FORMAT):
        raise LockError(f'is no lock file, which has "format": "{_FORMAT}"')
    if type(data.get("version")) is not int or data["version"] != _VERSION:
        raise LockError(
            f"has version {_brief(data.get('version'))}, but this txcore reads version {_VERSION}"
        )
    targets = _typed(data.get("targets"), dict, "targets")
    return {target: _lock(target, section) for target, section in targets.items()}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:  # what a bad merge leaves; json would keep the last one
            raise LockError(f"has {_brief(name)} twice")
        found[name] = value
    return found


def _short(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise LockError(f"is damaged: it has a number of {len(digits)} digits")
    return int(digits)


def _no_number(text: str) -> Any:
    raise LockError(f"is damaged: {text} is no number of bytes or trips")


def _brief(value: Any) -> str:
    """Quote a value that may be anything: short, and on one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _typed(value: Any, wanted: type, where: str) -> Any:
    is_one = type(value) is wanted  # not isinstance: a bool is no number here
    if not is_one or (wanted is int and value < 0):
        raise LockError(f"is damaged: {where} is {_brief(str(value))}, and no {wanted.__name__}")
    return value


def _lock(target: str, section: Any) -> Lock:
    where = f"target {_brief(target)}"
    section = _typed(section, dict, where)
    budgets = _typed(section.get("budgets", {}), dict, f"{where}, budgets")
    for axis, most in budgets.items():
        _typed(most, int, f"{where}, budget {_brief(axis)}")
    listed = _typed(section.get("collectives"), list, f"{where}, collectives")
    entries = [_entry(data, f"{where}, collective {i + 1}") for i, data in enumerate(listed)]
    if len({entry.key for entry in entries}) < len(entries):
        raise LockError(f"is damaged: {where} has a collective twice")
    return Lock(target, tuple(sorted(entries, key=lambda entry: entry.key)), budgets)


def _entry(data: Any, where: str) -> Entry:
    data = _typed(data, dict, where)
    if wrong := {*data} - {*_FIELDS} or {*_FIELDS} - _MAY_LACK - {*data}:
        names = _brief(", ".join(sorted(wrong)))[1:-1]
        raise LockError(f"is damaged: {where} has unknown or lacks {names}")
    if ("tag" in data) == ("source" in data):
        raise LockError(f"is damaged: {where} needs either a tag or a source")
    for name, value in data.items():
        _typed(value, _FIELDS[name], f"{where}, {name}")
    axes = [_typed(axis, str, f"{where}, axes") for axis in data["axes"]]
    return Entry(**{"tag": "", "source": "", **data, "axes": tuple(axes)})


def dumps(locks: Iterable[Lock]) -> str:
    """Return the text of a lock file: equal locks give equal text."""
    sections = ",\n".join(_section(lock) for lock in sorted(locks, key=lambda lock: lock.target))
    return (
        f'{{\n  "format": "{_FORMAT}",\n  "version": {_VERSION},\n  "targets": {{\n'
        f"{sections}\n  }}\n}}\n"
    )


def _section(lock: Lock) -> str:
    lines = ",".join(f"\n        {json.dumps(_to_dict(entry))}" for entry in lock.entries)
    collectives = f"[{lines}\n      ]" if lines else "[]"
    budgets = json.dumps(dict(lock.budgets), sort_keys=True)
    return (
        f'    {json.dumps(lock.target)}: {{\n      "budgets": {budgets},\n'
        f'      "collectives": {collectives}\n    }}'
    )


def _to_dict(entry: Entry) -> Mapping[str, Any]:
    named = {"tag": entry.tag} if entry.tag else {"source": entry.source}
    known = {} if entry.trips_known else {"trips_known": False}
    return {
        **named,
        "kind": entry.kind,
        "axes": entry.axes,
        "dtype": entry.dtype,
        "payload_bytes": entry.payload_bytes,
        "trips": entry.trips,
        **known,
        "origin": entry.origin,
    }


def write(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file in one step, so that nobody ever reads half of it; make its folder.

    Raises:
      LockError: it cannot be written.
    """
    target = os.path.realpath(path)
    draft = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(draft, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(draft, target)
    except OSError as error:
        raise LockError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if os.path.exists(draft):
            os.remove(draft)
