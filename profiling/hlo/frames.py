"""The source tables in a module's header: which file and line a stack frame's number means."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from txcore.profiling.hlo.types import to_int

TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_FIELD = re.compile(r"\b(\w++)=(\d+)")
_DEEPEST = 256  # of each stack that many calls from its innermost are walked


@dataclass(frozen=True, slots=True)
class Frame:
    """One call on a stack; `parent` is the number of its caller's frame, 0 where it has none."""

    file: str
    line: int
    parent: int


def read_frames(tables: Mapping[str, Mapping[int, str]]) -> dict[int, Frame]:
    """Join the numbered rows of the four tables into frames, by their numbers."""
    rows = {number: _read_fields(row) for number, row in tables.get("StackFrames", {}).items()}
    locations = {
        number: _read_fields(row) for number, row in tables.get("FileLocations", {}).items()
    }
    files = {number: row.strip('"') for number, row in tables.get("FileNames", {}).items()}
    # Recent XLA prints a parent's number plus one, so that 1 means "none"; then no parent is 0.
    shift = int(all(row.get("parent_frame_id", 0) >= 1 for row in rows.values()))
    frames = {}
    for number, row in rows.items():
        location = locations.get(row.get("file_location_id", 0), {})
        file = files.get(location.get("file_name_id", 0), "")
        parent = row.get("parent_frame_id", 0) - shift
        frames[number] = Frame(file, location.get("line", 0), parent)
    return frames


def walk_callers(frames: Mapping[int, Frame], number: int) -> Iterator[tuple[str, int]]:
    """Yield (file, line) of a frame and its callers; a damaged table cannot make it loop."""
    seen: set[int] = set()
    while number in frames and number not in seen and len(seen) < _DEEPEST:
        seen.add(number)
        yield frames[number].file, frames[number].line
        number = frames[number].parent


def _read_fields(row: str) -> dict[str, int]:
    return {name: to_int(number) for name, number in _FIELD.findall(row)}
