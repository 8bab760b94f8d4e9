"""The file of measured choices: JSON with one entry on each line, checked as a whole when read."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from txcore import bounded_json
from txcore.errors import TxcoreError
from txcore.kernels.dispatch.back_ends import BACK_ENDS
from txcore.outside import brief, read_regular, replace_text

_FORMAT = "txcore-tuning"
_VERSION = 1
_MOST_BYTES = 1 << 24
_ENTRY = {
    "implementation": frozenset(BACK_ENDS),
    "config": {str: int | str | bool | None},
    **{"microseconds": {str: float}, "jax": str, "machine": str},
}
_SCHEMA = {"entries": {str: _ENTRY}}


class TuningError(TxcoreError, ValueError):
    """A tuning file cannot be used: which file, what it needs, what it has, and what to do."""


@dataclass(frozen=True)
class Entry:
    """Hold the fastest candidate measured for a class of problems.

    Attributes:
      implementation: its back end, one of `back_ends.BACK_ENDS`.
      config: the fields of its configuration, {} where it has none.
      microseconds: label -> the median time of one call, for every candidate.
      jax: the version of jax that measured it.
      machine: the processor or accelerator that measured it.
    """

    implementation: str
    config: Mapping[str, int | str | bool | None]
    microseconds: Mapping[str, float]
    jax: str
    machine: str


def label_candidate(implementation: str, config: Mapping[str, Any]) -> str:
    """Name a candidate by its implementation and its configuration's fields.

    Example:
      >>> label_candidate("pallas_triton", {"rows": 8})
      'pallas_triton(rows=8)'
    """
    fields = ", ".join(f"{name}={value}" for name, value in config.items())
    return f"{implementation}({fields})" if fields else implementation


def read_entries(path: str | os.PathLike[str], *, max_bytes: int = _MOST_BYTES) -> dict[str, Entry]:
    """Read a tuning file.

    Args:
      path: the file.
      max_bytes: the longest file to read, 16 MiB by default.

    Returns:
      Its entries by `Problem.key`; {} where there is no such file.

    Raises:
      TuningError: it cannot be read, or is not a tuning file of this version.
    """
    try:
        data = read_regular(path, max_bytes)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _refuse_file(path, f"cannot be read ({error.strerror or error})") from None
    if data is None:
        raise _refuse_file(path, f"needs at most {max_bytes} bytes, and is longer")
    try:
        found = bounded_json.loads(data, _SCHEMA, format=_FORMAT, version=_VERSION)
        return {key: _check_entry(key, fields) for key, fields in found["entries"].items()}
    except ValueError as error:
        raise _refuse_file(path, str(error)) from None


def _refuse_file(path: Any, reason: str) -> TuningError:
    return TuningError(
        f"the tuning file {os.fspath(path)} {reason}: delete it, and run `txcore tune` to measure "
        "again, or name another by TXCORE_TUNING (empty for none)"
    )


def _check_entry(key: str, fields: Mapping[str, Any]) -> Entry:
    entry, where = Entry(**fields), f"entries[{brief(key)}]['microseconds']"
    for name, time in entry.microseconds.items():
        if not time > 0:
            raise TuningError(f"needs positive numbers in {where}, got {time} for {brief(name)}")
    if label_candidate(entry.implementation, entry.config) not in entry.microseconds:
        raise TuningError(f"needs the time of the chosen candidate in {where}, got none")
    return entry


def write_entries(path: str | os.PathLike[str], entries: Mapping[str, Entry]) -> None:
    """Replace a tuning file in one step, so that no reader sees half of it; make its folder.

    Args:
      path: the file.
      entries: all of its entries, by `Problem.key`.

    Raises:
      TuningError: it cannot be written.
    """
    try:
        replace_text(path, _dump_entries(entries))
    except OSError as error:
        raise TuningError(
            f"the tuning file {os.fspath(path)} cannot be written ({error.strerror or error}): "
            "name another"
        ) from None


def _dump_entries(entries: Mapping[str, Entry]) -> str:
    head = f'{{\n  "format": "{_FORMAT}",\n  "version": {_VERSION},\n  "entries": {{\n'
    lines = [
        f"    {json.dumps(key)}: {json.dumps(dataclasses.asdict(entry))}"
        for key, entry in sorted(entries.items())
    ]
    return head + ",\n".join(lines) + "\n  }\n}\n"
