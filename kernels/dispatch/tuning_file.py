"""The file of measured choices: JSON with one entry a line, checked whole before it is believed."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from txcore import bounded_json
from txcore.errors import TxcoreError
from txcore.outside import brief, read_regular, replace_text

_FORMAT = "txcore-tuning"
_VERSION = 1
_MOST_BYTES = 1 << 24
_ENTRY = {
    "implementation": frozenset({"xla", "pallas", "triton"}),
    "config": {str: int | str | bool | None},
    **{"microseconds": {str: float}, "jax": str, "machine": str},
}
_SCHEMA = {"entries": {str: _ENTRY}}


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
        data = read_regular(path, max_bytes)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror or error})") from None
    if data is None:
        raise _refused(path, f"needs at most {max_bytes} bytes, and is longer")
    try:
        found = bounded_json.loads(data, _SCHEMA, format=_FORMAT, version=_VERSION)
        return {key: _entry(key, fields) for key, fields in found["entries"].items()}
    except ValueError as error:
        raise _refused(path, str(error)) from None


def _refused(path: Any, reason: str) -> TuningError:
    return TuningError(
        f"the tuning file {os.fspath(path)} {reason}. Delete it, and run `txcore tune` to measure "
        "anew, or name another by TXCORE_TUNING (an empty one for none)."
    )


def _entry(key: str, fields: Mapping[str, Any]) -> Entry:
    entry, where = Entry(**fields), f"entries[{brief(key)}]['microseconds']"
    for name, time in entry.microseconds.items():
        if not time > 0:
            raise TuningError(f"needs positive numbers as {where}, got {time} for {brief(name)}")
    if label(entry.implementation, entry.config) not in entry.microseconds:
        raise TuningError(f"needs the time of what it chooses in {where}, got none")
    return entry


def write(path: str | os.PathLike[str], entries: Mapping[str, Entry]) -> None:
    """Replace a tuning file in one step, so that nobody ever reads half of it; make its folder.

    Args:
      path: the file.
      entries: all of its entries, by `Problem.key`.

    Raises:
      TuningError: it cannot be written.
    """
    try:
        replace_text(path, _dumps(entries))
    except OSError as error:
        raise TuningError(
            f"the tuning file {os.fspath(path)} cannot be written ({error.strerror or error}): "
            "name another"
        ) from None


def _dumps(entries: Mapping[str, Entry]) -> str:
    head = f'{{\n  "format": "{_FORMAT}",\n  "version": {_VERSION},\n  "entries": {{\n'
    lines = [
        f"    {json.dumps(key)}: {json.dumps(dataclasses.asdict(entry))}"
        for key, entry in sorted(entries.items())
    ]
    return head + ",\n".join(lines) + "\n  }\n}\n"
