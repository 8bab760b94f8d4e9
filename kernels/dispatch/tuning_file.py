"""The file of measured choices: JSON with one entry a line, checked whole before it is believed."""

import dataclasses
import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from txcore.errors import TxcoreError

_FORMAT = "txcore-tuning"
_VERSION = 1
_MOST_BYTES = 1 << 24
_MOST_DIGITS = 18
_IMPLEMENTATIONS = ("xla", "pallas", "triton")


class TuningError(TxcoreError, ValueError):
    """A tuning file cannot be used; says which, what was required, what was found, what to do."""


@dataclass(frozen=True)
class Entry:
    """Hold the fastest candidate measured for a class of problems.

    Attributes:
      implementation: "xla", "pallas" or "triton".
      config: its configuration's fields, {} where it has none.
      microseconds: the median time of one call of every candidate, by its label.
      jax: the version that it was measured with.
      machine: the processor or accelerator that it was measured on.
    """

    implementation: str
    config: Mapping[str, int | str | bool | None]
    microseconds: Mapping[str, float]
    jax: str
    machine: str


def label(implementation: str, config: Mapping[str, Any]) -> str:
    """Name a candidate by its implementation and its configuration's fields.

    Example:
      >>> label("pallas", {"rows": 8})
      'pallas(rows=8)'
    """
    fields = ", ".join(f"{name}={value}" for name, value in config.items())
    return f"{implementation}({fields})" if fields else implementation


def read(path: str | os.PathLike[str], *, max_bytes: int = _MOST_BYTES) -> dict[str, Entry]:
    """Read a tuning file.

    Args:
      path: the file.
      max_bytes: the longest file to read, 16 MiB by default.

    Returns:
      Its entries by `Problem.key`; none where there is no such file.

    Raises:
      TuningError: it cannot be read, or is no tuning file of this version.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise TuningError(f"must have at most {max_bytes} bytes, and is longer")
        return _loads(data.decode())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror or error})") from None
    except TuningError as error:
        raise _refused(path, str(error)) from None
    except UnicodeDecodeError:
        raise _refused(path, "must be text, and is not") from None
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"must be JSON, and is not ({error})") from None


def _refused(path: Any, reason: str) -> TuningError:
    return TuningError(
        f"the tuning file {os.fspath(path)} {reason}. Delete it, and run `txcore tune` to measure "
        "anew, or name another by TXCORE_TUNING (an empty one for none)."
    )


def _loads(text: str) -> dict[str, Entry]:
    data = json.loads(
        text, object_pairs_hook=_each_once, parse_int=_short, parse_constant=_no_number
    )
    if not (isinstance(data, dict) and data.get("format") == _FORMAT):
        raise TuningError(f'must have "format": "{_FORMAT}", and has not')
    if type(data.get("version")) is not int or data["version"] != _VERSION:
        raise TuningError(
            f"must have version {_VERSION} for this txcore, and has {_brief(data.get('version'))}"
        )
    entries = _typed(data.get("entries"), dict, "entries")
    return {key: _entry(key, fields) for key, fields in entries.items()}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:  # json alone would keep the last one
            raise TuningError(f"must have each name once, and has {_brief(name)} twice")
        found[name] = value
    return found


def _short(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise TuningError(
            f"must have numbers of at most {_MOST_DIGITS} digits, and has one of {len(digits)}"
        )
    return int(digits)


def _no_number(text: str) -> Any:
    raise TuningError(f"must have finite numbers, and has {text}")


def _entry(key: str, fields: Any) -> Entry:
    where = f"entry {_brief(key)}"
    fields = _typed(fields, dict, where)
    wanted = [field.name for field in dataclasses.fields(Entry)]
    if set(fields) != set(wanted):
        raise TuningError(
            f"must have the fields {', '.join(wanted)} in {where}, and has "
            f"{_brief(', '.join(sorted(fields)))}"
        )
    _check_values(fields, where)
    entry = Entry(**fields)
    if label(entry.implementation, entry.config) not in entry.microseconds:
        raise TuningError(f"must have microseconds of what it chooses in {where}, and has none")
    return entry


def _check_values(fields: Mapping[str, Any], where: str) -> None:
    if fields["implementation"] not in _IMPLEMENTATIONS:
        raise TuningError(
            f"must have one of {', '.join(map(repr, _IMPLEMENTATIONS))} as implementation in "
            f"{where}, and has {_brief(fields['implementation'])}"
        )
    for name, value in _typed(fields["config"], dict, f"config in {where}").items():
        if type(value) not in (int, str, bool, type(None)):
            raise TuningError(
                f"must have an integer, text, true, false or null as config {_brief(name)} in "
                f"{where}, and has {_brief(value)}"
            )
    for name, value in _typed(fields["microseconds"], dict, f"microseconds in {where}").items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise TuningError(
                f"must have positive numbers as microseconds in {where}, and has {_brief(value)} "
                f"for {_brief(name)}"
            )
    for name in ("jax", "machine"):
        _typed(fields[name], str, f"{name} in {where}")


def _typed(value: Any, wanted: type, where: str) -> Any:
    if type(value) is not wanted:
        kind = "an object" if wanted is dict else "text"
        raise TuningError(f"must have {kind} as {where}, and has {_brief(value)}")
    return value


def _brief(value: Any) -> str:
    """Quote a value that may be anything: short, and on one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write(path: str | os.PathLike[str], entries: Mapping[str, Entry]) -> None:
    """Replace a tuning file in one step, so that nobody ever reads half of it; make its folder.

    Args:
      path: the file.
      entries: all of its entries, by `Problem.key`.

    Raises:
      TuningError: it cannot be written.
    """
    target = os.path.realpath(path)
    draft = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(draft, "x", encoding="utf-8", newline="\n") as file:
            file.write(_dumps(entries))
        os.replace(draft, target)
    except OSError as error:
        raise TuningError(
            f"the tuning file {os.fspath(path)} cannot be written ({error.strerror or error}): "
            "name another"
        ) from None
    finally:
        if os.path.exists(draft):
            os.remove(draft)


def _dumps(entries: Mapping[str, Entry]) -> str:
    head = f'{{\n  "format": "{_FORMAT}",\n  "version": {_VERSION},\n  "entries": {{\n'
    lines = [
        f"    {json.dumps(key)}: {json.dumps(dataclasses.asdict(entry))}"
        for key, entry in sorted(entries.items())
    ]
    return head + ",\n".join(lines) + "\n  }\n}\n"
