"""The folder of a profile: for each rank its trace, the programs that ran, and what it was.

rank0.xplane.pb    what jax's profiler recorded
rank0.json         host, devices, steps, and the audit of each program's collectives
rank0.0.hlo        the optimized HLO of its program 0
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from txcore import bounded_json
from txcore.outside import read_regular, replace_text
from txcore.profiling.trace.model import Program, Rank, Row, TraceError
from txcore.profiling.trace.programs import read_program
from txcore.profiling.trace.read import read_events

_FORMAT, _VERSION = "txcore-trace", 1
_MOST_JSON, MOST_HLO = 1 << 26, 1 << 28
_COUNT = range(10**18 + 1)
_ROW = {
    **{"op": str, "kind": str, "origin": str, "tags": [str], "axes": [str], "group_size": _COUNT},
    **{"dtype": str, "source": str, "payload_bytes": _COUNT, "wire_bytes": _COUNT},
    **{"trips": _COUNT, "trips_known": bool, "explained": bool},
}
_PROGRAM = {"file": str, "checked": bool, "devices": [_COUNT], "collectives": [_ROW]}
_SCHEMA = {
    **{"rank": range(1 << 20), "processes": range(1, 1 << 20), "host": str, "devices": [_COUNT]},
    **{"asked_steps": _COUNT, "recorded_steps": _COUNT, "programs": [_PROGRAM]},
}
_NAME = re.compile(r"rank(\d{1,6})\.xplane\.pb$")
_OWN = re.compile(r"rank\d{1,6}\.(?:xplane\.pb|json|\d{1,6}\.hlo)$")


def is_own_file(name: str) -> bool:
    """Tell whether a file of this name is one that a profile writes."""
    return _OWN.match(name) is not None


def write_rank(
    folder: pathlib.Path,
    about: Mapping[str, Any],
    programs: Iterable[tuple[str, Sequence[Row], bool, Sequence[int]]],
) -> None:
    """Write the files beside a rank's trace.

    Args:
      folder: where.
      about: rank, processes, host, devices, asked_steps, recorded_steps.
      programs: text, collectives, whether they were checked, and the mesh's devices, of each.

    Raises:
      OSError: it cannot be written.
    """
    listed = []
    for number, (hlo, rows, checked, devices) in enumerate(programs):
        name = f"rank{about['rank']}.{number}.hlo"
        replace_text(folder / name, hlo)
        plain = [_plain_row(row) for row in rows]
        listed.append(
            {"file": name, "checked": checked, "devices": [*devices], "collectives": plain}
        )
    content = {"format": _FORMAT, "version": _VERSION, **about, "programs": listed}
    replace_text(folder / f"rank{about['rank']}.json", json.dumps(content, indent=1) + "\n")


def _plain_row(row: Row) -> dict[str, Any]:
    found = {name: getattr(row, name) for name in _ROW}
    for name in ("payload_bytes", "wire_bytes", "trips", "group_size"):
        found[name] = min(found[name], 10**18)
    return found


def read_folder(
    folder: str | os.PathLike[str], hlo: Sequence[str] = ()
) -> tuple[tuple[Rank, ...], tuple[str, ...]]:
    """Read the traces of all ranks in a folder of `tx.profile`, or of `jax.profiler`.

    Args:
      folder: the folder, or one `.xplane.pb`.
      hlo: texts of optimized HLO of the programs that ran, where the folder holds none.

    Returns:
      The ranks in order, and what of the whole is missing, for people.

    Raises:
      TraceError: there is no trace in it, or a file of it cannot be read.
    """
    path = pathlib.Path(folder)
    given = tuple(_read_given(text) for text in hlo)
    named = sorted(path.glob("rank*.xplane.pb")) if path.is_dir() else []
    if named and (found := {int(m[1]): p for p in named if (m := _NAME.match(p.name))}):
        ranks = tuple(_read_rank(path, number, found[number], given) for number in sorted(found))
        return ranks, tuple(_list_missing(ranks))
    files = [path] if path.is_file() else _newest_session(path)
    if not files:
        raise TraceError(
            f"a trace needs an .xplane.pb, but {path} holds none: name a folder that tx.profile or "
            "jax.profiler.trace wrote"
        )
    ranks = tuple(
        dataclasses.replace(read_events(file, rank), programs=given)
        for rank, file in enumerate(files)
    )
    return ranks, ()


def _newest_session(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of jax.profiler's newest session, one for each host."""
    files = sorted(folder.rglob("*.xplane.pb")) if folder.is_dir() else []
    sessions = {file.parent for file in files}
    newest = max(sessions, key=lambda each: each.stat().st_mtime) if sessions else None
    return [file for file in files if file.parent == newest]


def _read_given(text: str) -> Program:
    try:
        return read_program(text, checked=False)
    except ValueError as error:
        raise TraceError(f"the HLO of a trace {error}: give optimized HLO") from None


def _read_rank(
    folder: pathlib.Path, rank: int, file: pathlib.Path, given: tuple[Program, ...]
) -> Rank:
    traced = read_events(file, rank)
    about = folder / f"rank{rank}.json"
    if not about.exists():
        note = f"rank {rank}: {about.name} is missing: its profile was cut off before it ended"
        return dataclasses.replace(traced, programs=given, notes=(*traced.notes, note))
    data = _load_json(about)
    programs = tuple(_load_program(folder, each, about) for each in data["programs"])
    notes = [f"rank {rank}: {note}" for note in traced.notes]
    if data["recorded_steps"] < data["asked_steps"]:
        notes.append(
            f"rank {rank}: the trace is cut off after {data['recorded_steps']} of "
            f"{data['asked_steps']} steps: training ended first"
        )
    if traced.platform == "gpu" and not any(event.in_graph for event in traced.events):
        notes.append(
            f"rank {rank}: an engine's steps ran without command buffers (CUDA graphs), as "
            "tx.profile compiles them: outside of a profile a step may take less time"
        )
    return dataclasses.replace(
        traced,
        host=data["host"],
        devices=_name_devices(traced, data["devices"]),
        programs=(*given, *programs),
        processes=data["processes"],
        notes=tuple(notes),
    )


def _name_devices(traced: Rank, ids: list[int]) -> tuple[int, ...]:
    """Return the ids of the devices with events: on GPU a plane's number is a place in them."""
    if traced.platform == "cpu":
        return traced.devices
    return tuple(ids[place] if place < len(ids) else place for place in traced.devices)


def _load_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        data = read_regular(file, _MOST_JSON)
        if data is None:
            raise TraceError(f"{file} is longer than {_MOST_JSON} bytes: profile again")
        return bounded_json.loads(data, _SCHEMA, format=_FORMAT, version=_VERSION)
    except OSError as error:
        raise TraceError(f"cannot read {file}: {error.strerror or error}") from None
    except bounded_json.JsonError as error:
        raise TraceError(f"{file} {error}: profile again") from None


def _load_program(folder: pathlib.Path, data: dict[str, Any], about: pathlib.Path) -> Program:
    if not is_own_file(data["file"]):
        raise TraceError(f"{about} needs the name of an HLO file beside it, got {data['file']!r}")
    try:
        text = read_regular(folder / data["file"], MOST_HLO)
    except OSError as error:
        raise TraceError(f"cannot read {folder / data['file']}: {error.strerror}") from None
    if text is None:
        raise TraceError(f"{folder / data['file']} is longer than {MOST_HLO} bytes")
    rows = [
        Row(**each | {"tags": tuple(each["tags"]), "axes": tuple(each["axes"])})
        for each in data["collectives"]
    ]
    try:
        return read_program(
            text.decode(errors="replace"), rows, data["devices"], checked=data["checked"]
        )
    except ValueError as error:
        raise TraceError(f"{folder / data['file']} {error}: profile again") from None


def _list_missing(ranks: Sequence[Rank]) -> Iterable[str]:
    wanted = max((rank.processes for rank in ranks), default=0)
    absent = sorted(set(range(wanted)) - {rank.rank for rank in ranks})
    if absent:
        yield (
            f"the traces of rank {', '.join(map(str, absent))} of {wanted} are missing: their "
            "waiting and arrivals are not known; copy their files into the folder"
        )
