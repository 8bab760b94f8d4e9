"""Read single attributes of an instruction: operands, callees, metadata, tags, source line."""

import re
from collections.abc import Iterator

from txcore.profiling.hlo.frames import walk
from txcore.profiling.hlo.text import Instruction, Module, closing
from txcore.profiling.hlo.types import HloError

# Values may be quoted and hold any bracket; possessive repeats keep damaged lines linear.
_NESTED = r"\{(?:[^{}]|\{[^{}]*+\})*+\}"  # _xla_send_recv_source_target_pairs={{0,1},{1,0}}
_BLOCK = r"=\{((?:[^{}\"]|\"(?:[^\"\\]|\\.)*+\"|" + _NESTED + r")*+)\}"
_FRONTEND = re.compile(r"\bfrontend_attributes" + _BLOCK)
_METADATA = re.compile(r"\bmetadata" + _BLOCK)
_FRONTEND_PAIR = re.compile(r"([\w.\-]+)=\"((?:[^\"\\]|\\.)*+)\"")
_OP_NAME = re.compile(r"\bop_name=\"((?:[^\"\\]|\\.)*+)\"")
_SOURCE_FILE = re.compile(r"\bsource_file=\"((?:[^\"\\]|\\.)*+)\"")
_SOURCE_LINE = re.compile(r"\bsource_line=(\d+)")
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_TARGET = re.compile(r"\bcustom_call_target=\"((?:[^\"\\]|\\.)*+)\"")
_CALLS = re.compile(
    r"\b(?:calls|body|condition|to_apply|branch_computations|true_computation|false_computation"
    r"|called_computations|async_execution_computation)=(\{[^{}]*\}|%?[\w.\-]+)"
)
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_TRIP_COUNT = re.compile(r'known_trip_count\\?"?\s*[:=]\s*\{\s*\\?"?n\\?"?\s*[:=]\s*\\?"?(\d+)')
_NAME = re.compile(r"[\w.\-]+")
_PLAIN_OPERANDS = re.compile(r"\(([^()\"/]*)\)")  # most lines: names and commas only
_COMMENT = re.compile(r"/\*.*?\*/")  # XLA counts the elements of long lists: /*index=5*/


def split(instruction: Instruction) -> tuple[str, str]:
    """Return an instruction's operands, without their brackets, and its attributes.

    Raises:
      HloError: the operands' bracket is never closed.
    """
    rest = instruction.rest
    if plain := _PLAIN_OPERANDS.match(rest):
        return plain[1], rest[plain.end() :]
    end = closing(rest, 0)
    if end is None:
        raise HloError(f"the operands of {instruction.name} do not end")
    return _COMMENT.sub("", rest[1 : end - 1]), rest[end:]


def callees(instruction: Instruction) -> tuple[str, ...]:
    """Return the names of the computations that an instruction runs."""
    names = (_NAME.findall(group) for group in _CALLS.findall(instruction.rest))
    return tuple(dict.fromkeys(name for group in names for name in group))


def trip_count(instruction: Instruction) -> int | None:
    """Return how often a while loop runs, or None where the compiler does not know."""
    found = _TRIP_COUNT.search(instruction.rest)
    return int(found[1]) if found else None


def frontend_attributes(attributes: str) -> dict[str, str]:
    """Return the frontend attributes, jax's tags and the partitioner's mark among them."""
    block = _FRONTEND.search(attributes)
    return dict(_FRONTEND_PAIR.findall(block[1])) if block else {}


def op_name(attributes: str) -> str:
    """Return the path of jax transformations and the primitive that an op came from, or ""."""
    block = _METADATA.search(attributes)
    found = _OP_NAME.search(block[1]) if block else None
    return found[1] if found else ""


def metadata(attributes: str) -> str:
    """Return an op's metadata as printed: equal for ops that come from the same place."""
    block = _METADATA.search(attributes)
    return block[1] if block else ""


def channel(instruction: Instruction) -> str:
    """Return the channel that an instruction talks on, or ""."""
    found = _CHANNEL.search(instruction.rest)
    return found[1] if found else ""


def custom_call_target(attributes: str) -> str:
    """Return the function that a custom call runs, or ""."""
    found = _TARGET.search(attributes)
    return found[1] if found else ""


def source_frames(attributes: str, module: Module) -> Iterator[tuple[str, int]]:
    """Yield (file, line) of an op's source, innermost call first; nothing where it has none."""
    block = _METADATA.search(attributes)
    if block is None:
        return
    if (file := _SOURCE_FILE.search(block[1])) and (line := _SOURCE_LINE.search(block[1])):
        yield file[1], int(line[1])
    elif frame := _FRAME.search(block[1]):
        yield from walk(module.frames, int(frame[1]))
