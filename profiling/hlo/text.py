"""Read the text of HLO modules, of any platform and age, into computations of instructions.

Only what an audit needs is kept: each instruction's name, opcode, type, and the rest of its line,
which `attributes.py` reads for the few instructions that matter. So the time is linear in the
length of the text. An instruction that cannot be read is kept as such: it may have been a
collective.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from txcore.profiling.hlo.frames import TABLES, Frame, read_frames
from txcore.profiling.hlo.types import split_outside

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_NAME = r"\s*(ROOT\s+)?%?([\w.\-]+)\s*=\s*"
_INSTRUCTION = re.compile(_NAME + r"([a-z]\w*\[[^\[\]]*\](?:\{[^{}]*\})?)\s+([a-z][\w\-]*)(\(.*)")
_TUPLE_INSTRUCTION = re.compile(_NAME + r"b?(?=\()")  # b(...) is the type of a buffer
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)(\(.*)")
_COMPUTATION = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*)?\{\s*$")
_COUNT = re.compile(r"\b(num_partitions|replica_count)=(\d+)")
_CHOOSES = "allow_spmd_sharding_propagation_to_output={true"
_ELEMENT = re.compile(r"%([\w.\-]+)#(\d+)")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*+"')
# A damaged line: the beginning of an instruction, or a trace of a collective.
_TRACES = ("replica_groups=", "source_target_pairs=", "custom_call_target=")
_LOOKS_DAMAGED = re.compile("|".join((*KINDS, *_TRACES, r"^\s*(?:ROOT\s+)?%")))
_LONE_NAME = re.compile(r"\s*(?:ROOT\s+)?[A-Za-z_][\w.\-]*\s*(?:=|$)")
_COLLECTIVE = re.compile(rf"(?:{'|'.join(KINDS)})(?:-start)?\(|{'|'.join(_TRACES)}")
_SECOND = re.compile(r"(?:^|[\s,)}])%?[\w.\-]+ = (?:[a-z]\w*\[|\()")
_TABLE_ROW = re.compile(r'(\d+)\s+("(?:[^"\\]|\\.)*+"|\{[^{}]*\})\s*$')


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line: `%name = type opcode(operands), attributes`; `rest` starts at the operands' "("."""

    name: str
    opcode: str
    type: str
    rest: str
    is_root: bool = False


@dataclass(frozen=True, slots=True)
class Computation:
    """A named list of instructions, in the printed order; `unreadable` holds the lines lost."""

    name: str
    is_entry: bool
    instructions: tuple[Instruction, ...]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Module:
    """One HLO module; `frames` are the source lines that its header numbers.

    chooses_output_shardings: the compiler was free to choose the shardings of the results.
    """

    name: str
    num_partitions: int
    replica_count: int
    computations: Mapping[str, Computation]
    frames: Mapping[int, Frame]
    chooses_output_shardings: bool = False


@dataclass(slots=True)
class _Draft:
    """A module while its lines are read."""

    has_header: bool = False
    name: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    chooses_output_shardings: bool = False
    computations: dict[str, Computation] = field(default_factory=dict)
    tables: dict[str, dict[int, str]] = field(default_factory=dict)
    table: str = ""
    computation: str = ""
    is_entry: bool = False
    instructions: list[Instruction] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def read_modules(text: str) -> tuple[Module, ...]:
    """Read every HLO module of a text; lines before the first header form a module of their own.

    Args:
      text: what `compiled.as_text()` returns, or XLA dumps, also several one after the other.

    Returns:
      The modules, in the text's order. Text that holds no instruction gives none.

    Example:
      >>> module, = read_modules("HloModule m\\nENTRY %main (x: f32[2]) -> f32[2] {\\n"
      ...                        "  ROOT %x = f32[2]{0} parameter(0)\\n}\\n")
      >>> module.computations["main"].instructions[0].opcode
      'parameter'
    """
    modules = [_finish(draft) for draft in _drafts(text.splitlines())]
    return tuple(m for m in modules if m.computations)


def _drafts(lines: Iterable[str]) -> Iterable[_Draft]:
    draft = _Draft()
    for line in lines:
        if line.startswith("HloModule"):
            yield draft
            draft = _Draft(
                has_header=True, name=line.split(",")[0].removeprefix("HloModule").strip()
            )
            draft.counts = {name: int(count) for name, count in _COUNT.findall(line)}
            if _COLLECTIVE.search(_unquoted(line)):
                draft.unreadable.append(line.strip())
            draft.chooses_output_shardings = _CHOOSES in line
        else:
            _read_line(draft, line)
    yield draft


def _read_line(draft: _Draft, line: str) -> None:
    if not line:
        return
    if instruction := read_instruction(line):
        draft.instructions.append(instruction)
        if " = " in instruction.rest and _SECOND.search(_unquoted(instruction.rest)):
            draft.unreadable.append(line.strip())  # two lines that lost what parted them
    elif draft.table and (row := _TABLE_ROW.match(line)):
        draft.tables[draft.table][int(row[1])] = row[2]
    elif "=" in line and "(" in line and _COLLECTIVE.search(line):
        draft.unreadable.append(line.strip())
    elif line.startswith("}"):
        _close_computation(draft)
    elif line.rstrip() in TABLES:
        draft.table = line.rstrip()
        draft.tables[draft.table] = {}
    elif header := _COMPUTATION.match(line):
        _close_computation(draft)
        draft.table = ""
        draft.computation, draft.is_entry = header[2], bool(header[1])
    elif _LOOKS_DAMAGED.search(line) or (draft.instructions and _LONE_NAME.match(line)):
        draft.unreadable.append(line.strip())


def _unquoted(line: str) -> str:
    # With an odd number of quotes nobody knows what is inside of them.
    return line if line.count('"') % 2 else _QUOTED.sub('""', line)


def read_instruction(line: str) -> Instruction | None:
    """Split one line into name, type, opcode and the rest, or return None where it has none."""
    if found := _INSTRUCTION.match(line):
        return Instruction(found[2], found[4], found[3], found[5], bool(found[1]))
    if not (start := _TUPLE_INSTRUCTION.match(line)):
        return None
    end = closing(line, start.end())
    if end is None or not (opcode := _OPCODE.match(line, end)):
        return None
    return Instruction(start[2], opcode[1], line[start.end() : end], opcode[2], bool(start[1]))


_BRACKET = re.compile(r'[()]|"(?:[^"\\]|\\.)*+"')


def closing(text: str, start: int) -> int | None:
    """Return the index after the ")" that closes the "(" at `start`, or None."""
    depth = 0
    for bracket in _BRACKET.finditer(text, start):
        depth += {"(": 1, ")": -1}.get(bracket[0], 0)
        if depth == 0:
            return bracket.end()
    return None


def _close_computation(draft: _Draft) -> None:
    if draft.instructions or draft.unreadable:
        name = draft.computation
        if name in draft.computations:  # two of one name: keep both, lose nothing
            name = f"{name}#{len(draft.computations)}"
        instructions = (*_elements(draft.instructions), *draft.instructions)
        draft.computations[name] = Computation(
            name, draft.is_entry, instructions, tuple(draft.unreadable)
        )
    draft.computation, draft.is_entry = "", False
    draft.instructions, draft.unreadable = [], []


def _elements(instructions: Sequence[Instruction]) -> Iterator[Instruction]:
    """Yield an instruction for each tuple's element that is named short, %tuple#1, as operand."""
    used = {found for i in instructions if "#" in i.rest for found in _ELEMENT.findall(i.rest)}
    if not used:
        return
    types = {i.name: split_outside(i.type[1:-1], ",") for i in instructions if i.type[:1] == "("}
    for name, index in sorted(used):
        if int(index) < len(types.get(name, ())):
            rest = f"(%{name}), index={index}"
            type_ = types[name][int(index)]
            yield Instruction(f"{name}#{index}", "get-tuple-element", type_, rest)


def _finish(draft: _Draft) -> Module:
    if draft.has_header and draft.computation:
        draft.unreadable.append(f"the text ends inside of {draft.computation}")
    elif draft.has_header and not any(c.is_entry for c in draft.computations.values()):
        draft.unreadable.append(f"module {draft.name} has no ENTRY: the text is cut off")
    _close_computation(draft)
    return Module(
        name=draft.name,
        num_partitions=draft.counts.get("num_partitions", 1),
        replica_count=draft.counts.get("replica_count", 1),
        computations=draft.computations,
        frames=read_frames(draft.tables),
        chooses_output_shardings=draft.chooses_output_shardings,
    )
