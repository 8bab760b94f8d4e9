"""Read single attributes of an instruction: channel, trips, target, source line."""

import re
from collections.abc import Iterator

from txcore.profiling.hlo.frames import walk_callers
from txcore.profiling.hlo.scan import strip_quotes
from txcore.profiling.hlo.text import Instruction, Module
from txcore.profiling.hlo.types import to_int

_TRIP_COUNT = re.compile(r'known_trip_count\\?"?\s*[:=]\s*\{\s*\\?"?n\\?"?\s*[:=]\s*\\?"?(\d+)')


def trip_count(instruction: Instruction) -> int | None:
    """Return how often a while loop runs, or None where the compiler does not know."""
    found = _TRIP_COUNT.search(instruction.attributes.get("backend_config", ""))
    return to_int(found[1]) if found else None


def op_name(instruction: Instruction) -> str:
    """Return the path of jax transformations and the primitive that an op came from, or ""."""
    return instruction.metadata.get("op_name", "")


def metadata_text(instruction: Instruction) -> str:
    """Return an op's metadata as printed; ops from the same place have equal metadata."""
    return instruction.attributes.get("metadata", "")


def channel_id(instruction: Instruction) -> str:
    """Return the channel that an instruction talks on, or ""."""
    return instruction.attributes.get("channel_id", "")


def custom_call_target(instruction: Instruction) -> str:
    """Return the function that a custom call runs, or ""."""
    return strip_quotes(instruction.attributes.get("custom_call_target", ""))


def source_frames(instruction: Instruction, module: Module) -> Iterator[tuple[str, int]]:
    """Yield (file, line) of an op's calls, innermost first; nothing where it has no source."""
    said = instruction.metadata
    line, frame = said.get("source_line", ""), said.get("stack_frame_id", "")
    if (file := said.get("source_file")) and line.isdecimal():
        yield file, to_int(line)
    elif frame.isdecimal():
        yield from walk_callers(module.frames, to_int(frame))
