"""The lock file's text: canonical JSON with one entry a line, so that its diffs can be reviewed."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from txcore import bounded_json
from txcore.outside import brief, read_regular, replace_text
from txcore.profiling.lock.model import Entry, Lock, LockError
from txcore.profiling.lock.proof import Proof
from txcore.profiling.report.report import check_allowed

_FORMAT = "txcore-lock"
_VERSION = 1
_MOST_BYTES = 1 << 24
_COUNT = range(10**18)
_COLLECTIVE = {
    **{"tag?": str, "source?": str, "kind": str, "axes": [str], "dtype": str, "origin": str},
    **{"payload_bytes": _COUNT, "trips": _COUNT, "trips_known?": bool},
}
_PROOF = {
    **{"name": str, "versions": {str: str}, "options": {str: str}, "flags": [str]},
    **{"arguments": str, "opcodes": {str: _COUNT}, "module": str},
}
_SECTION = {
    **{"budgets?": {str: _COUNT}, "compiled_with?": {str: str}, "collectives": [_COLLECTIVE]},
    **{"allow?": [str], "proofs?": [_PROOF]},
}
_SCHEMA = {"targets": {str: _SECTION}}


def read_locks(path: str | os.PathLike[str], *, max_bytes: int = _MOST_BYTES) -> dict[str, Lock]:
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
        data = read_regular(path, max_bytes)
    except OSError as error:
        raise LockError(f"cannot read {path}: {error.strerror or error}") from None
    if data is None:
        raise LockError(
            f"a lock file needs at most {max_bytes} bytes, but {path} is longer: restore it, or "
            "delete and update it"
        )
    try:
        return parse_locks(data)
    except ValueError as error:
        raise LockError(f"{path} {error}: restore it, or delete and update it") from None


def parse_locks(data: bytes) -> dict[str, Lock]:
    """Return the locks in a lock file's bytes, by target.

    Raises:
      ValueError: it is no lock file of this version; the reason follows its name.
    """
    found = bounded_json.loads(data, _SCHEMA, format=_FORMAT, version=_VERSION)
    return {target: _parse_lock(target, section) for target, section in found["targets"].items()}


def _parse_lock(target: str, section: Mapping[str, Any]) -> Lock:
    where = f"targets[{brief(target)}]"
    listed = enumerate(section["collectives"])
    entries = [_parse_entry(data, f"{where}['collectives'][{i}]") for i, data in listed]
    first: dict[Any, int] = {}
    for i, entry in enumerate(entries):
        if (same := first.setdefault(entry.key, i)) != i:
            raise LockError(f"needs each collective once in {where}, got {same} again as {i}")
    entries.sort(key=lambda entry: entry.key)
    budgets, used = section.get("budgets", {}), section.get("compiled_with", {})
    proofs = tuple(
        Proof(**{**data, "flags": tuple(data["flags"])}) for data in section.get("proofs", ())
    )
    try:
        allow = tuple(sorted(check_allowed(section.get("allow", ()))))
    except ValueError as error:
        raise LockError(f"in {where}: {error}") from None
    return Lock(target, tuple(entries), budgets, used, allow, proofs)


def _parse_entry(data: Mapping[str, Any], where: str) -> Entry:
    if ("tag" in data) == ("source" in data):
        got = "both" if "tag" in data else "neither"
        raise LockError(f"needs either a tag or a source in {where}, got {got}")
    return Entry(**{"tag": "", "source": "", **data, "axes": tuple(data["axes"])})


def format_locks(locks: Iterable[Lock]) -> str:
    """Return the text of a lock file: equal locks give equal text."""
    sections = ",\n".join(
        _format_section(lock) for lock in sorted(locks, key=lambda lock: lock.target)
    )
    return (
        f'{{\n  "format": "{_FORMAT}",\n  "version": {_VERSION},\n  "targets": {{\n'
        f"{sections}\n  }}\n}}\n"
    )


def _format_section(lock: Lock) -> str:
    lines = ",".join(f"\n        {json.dumps(_to_dict(entry))}" for entry in lock.entries)
    collectives = f"[{lines}\n      ]" if lines else "[]"
    budgets = json.dumps(dict(lock.budgets), sort_keys=True)
    used = json.dumps(dict(lock.compiled_with), sort_keys=True)
    with_it = f'      "compiled_with": {used},\n' if lock.compiled_with else ""
    allow = f'      "allow": {json.dumps(lock.allow)},\n' if lock.allow else ""
    kept = ",".join(f"\n        {json.dumps(asdict(proof))}" for proof in lock.proofs)
    proofs = f',\n      "proofs": [{kept}\n      ]' if kept else ""
    return (
        f'    {json.dumps(lock.target)}: {{\n{allow}      "budgets": {budgets},\n{with_it}'
        f'      "collectives": {collectives}{proofs}\n    }}'
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


def write_file(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file in one step, so that nobody ever reads half of it; make its folder.

    Raises:
      LockError: it cannot be written.
    """
    try:
        replace_text(path, text)
    except OSError as error:
        raise LockError(f"cannot write {path}: {error.strerror or error}") from None
