"""Read the text of HLO modules, of any platform and age, into computations of instructions.

The module keeps what an audit needs: each instruction's name, opcode, type, and the rest of its
line, which `attributes.py` parses for the few instructions that matter. So the time is linear in
the length of the text. An unreadable instruction is kept too: it may be a collective.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from txcore.profiling.hlo.frames import TABLES, Frame, read_frames
from txcore.profiling.hlo.scan import (
    QUOTED,
    find_closing,
    read_attributes,
    split_outside,
    strip_ends,
    strip_quotes,
    without_comments,
    without_quoted,
)
from txcore.profiling.hlo.types import MOST, HloError, to_int

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
_COMPUTATION = re.compile(r"\s*(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*)?\{\s*$")
_END = re.compile(r"\s*\}\s*(?:,\s*execution_thread=.*|//.*)?$")
# What a log puts before each line: "[rank0]: ", "0: ", "I1127 12:34:56.789 123 compiler.cc:101] ".
_LOG_PREFIX = re.compile(
    r"(?:\[[^\[\]\"={}()]{1,80}\](?:<\w+>)?:?\s?|\d{1,9}:\s)?"
    r"(?:[^\"=(){}]{0,200}?\.(?:cc|cpp|h|py):\d+\]\s?)?"
)
_CALLS = (
    *("calls", "body", "condition", "to_apply", "branch_computations", "true_computation"),
    *("false_computation", "called_computations", "async_execution_computation"),
)
_WORD = re.compile(r"[\w.\-]+")
_CHOOSES = "allow_spmd_sharding_propagation_to_output"
_ELEMENT = re.compile(r"%([\w.\-]++)#(\d{1,9})(?!\d)")
# Signs of a damaged line: the beginning of an instruction, or a trace of a collective.
_TRACES = ("replica_groups=", "source_target_pairs=", "custom_call_target=")
_LOOKS_DAMAGED = re.compile("|".join((*KINDS, *_TRACES, r"^\s*(?:ROOT\s+)?%")))
_LONE_NAME = re.compile(r"\s*(?:ROOT\s+)?[A-Za-z_][\w.\-]*\s*(?:=|$)")
_COLLECTIVE = re.compile(rf"(?:{'|'.join(KINDS)})(?:-start)?\(|{'|'.join(_TRACES)}")
_SECOND = re.compile(r"(?:^|[\s,)}])%?[\w.\-]++ = (?:[a-z]\w*\[|\()")
_TABLE_ROW = re.compile(rf"\s*(\d{{1,9}})\s+({QUOTED}|\{{[^{{}}]*\}})\s*$")
_PLAIN_OPERANDS = re.compile(r"\(([^()\"/]*)\)")  # most lines: names and commas only
_METADATA = re.compile(rf"(?<![\w])(\w++)=({QUOTED}|[^\s\"{{}}]*+)")
_KERNEL_METADATA = "kernel_metadata={"
_MOST_LINES = 64  # of one kernel's metadata


@dataclass(frozen=True)
class Instruction:
    """One line: `%name = type opcode(operands), attributes`; `rest` starts at the operands' "(".

    Everything is parsed on first use and kept: many lines may refer to one.
    """

    name: str
    opcode: str
    type: str
    rest: str
    is_root: bool = False

    @cached_property
    def _parts(self) -> tuple[tuple[str, ...] | None, str]:
        if plain := _PLAIN_OPERANDS.match(self.rest):
            return tuple(split_outside(plain[1], ",")), self.rest[plain.end() :]
        end = find_closing(self.rest, 0)
        if end is None:
            return None, ""
        operands = without_comments(self.rest[1 : end - 1])
        return tuple(split_outside(operands, ",")), self.rest[end:]

    @property
    def operands(self) -> tuple[str, ...]:
        """Return the operands as printed: "%x", "f32[8]{0} %x".

        Raises:
          HloError: their bracket is never closed.
        """
        operands, _ = self._parts
        if operands is None:
            raise HloError(f"the operands of {self.name[:40]} do not end")
        return operands

    @cached_property
    def operand_names(self) -> tuple[str, ...]:
        """Return the operands' names, without types; none where they cannot be read."""
        return tuple(operand_name(operand) for operand in self._parts[0] or ())

    @cached_property
    def attributes(self) -> dict[str, str]:
        """Return the attributes as printed, by name; none where the operands do not end."""
        return read_attributes(self._parts[1])

    @cached_property
    def callees(self) -> tuple[str, ...]:
        """Return the names of the computations that it runs."""
        names: list[str] = []
        for key, printed in self.attributes.items():
            if key in _CALLS:
                names += _WORD.findall(printed)
        return tuple(dict.fromkeys(names))

    @cached_property
    def metadata(self) -> dict[str, str]:
        """Return jax's record of its origin: op_name, source_file, stack_frame_id, ..."""
        found: dict[str, str] = {}
        for name, value in _METADATA.findall(strip_ends(self.attributes.get("metadata", ""))):
            found.setdefault(name, strip_quotes(value))
        return found

    @cached_property
    def frontend(self) -> dict[str, str]:
        """Return the frontend attributes, jax's tags and the partitioner's mark among them."""
        printed = read_attributes(strip_ends(self.attributes.get("frontend_attributes", "")))
        return {name: strip_quotes(value) for name, value in printed.items()}


def operand_name(text: str) -> str:
    """Return the name in a printed operand, which older XLA precedes with its type."""
    return text[text.rfind(" ") + 1 :].removeprefix("%")


@dataclass(frozen=True, slots=True)
class Computation:
    """A named list of instructions, in the printed order; `unreadable` holds the lines lost."""

    name: str
    is_entry: bool
    instructions: tuple[Instruction, ...]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Module:
    """One HLO module.

    Attributes:
      name: its name.
      num_partitions, replica_count: the header's counts; None where it has neither. XLA omits a
        count of 1, and text written by hand may omit both.
      computations: by name.
      frames: the source lines that its header numbers.
      chooses_output_shardings: the compiler was free to choose the shardings of the results.
    """

    name: str
    num_partitions: int | None
    replica_count: int | None
    computations: Mapping[str, Computation]
    frames: Mapping[int, Frame]
    chooses_output_shardings: bool = False

    @property
    def devices(self) -> int | None:
        """Return the number of devices in the header, or None where it has none."""
        if self.num_partitions is None or self.replica_count is None:
            return None
        return self.num_partitions * self.replica_count


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
    in_constant: bool = False  # whose rows are on lines of their own
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
    modules = [_finish_module(draft) for draft in _read_drafts(text.splitlines())]
    return tuple(m for m in modules if m.computations)


def _read_drafts(lines: Iterable[str]) -> Iterable[_Draft]:
    draft = _Draft()
    for line in _join_metadata(map(_without_prefix, lines)):
        start = line.lstrip("\ufeff \t") if line[:1] in "\ufeff \t" else line
        if start.startswith("HloModule"):
            yield draft
            draft = _begin_module(start)
        else:
            _read_line(draft, line)
    yield draft


def _without_prefix(line: str) -> str:
    prefix = _LOG_PREFIX.match(line)[0]  # type: ignore[index]  # it matches nothing, too
    return line[len(prefix) :] if prefix else line


def _join_metadata(lines: Iterable[str]) -> Iterator[str]:
    """Join an instruction with the lines of its kernel's metadata, which XLA prints below it."""
    held: list[str] = []
    for line in lines:
        if held:
            held.append(line)
            if line.startswith("}"):
                yield "".join(held)
                held = []
            elif len(held) > _MOST_LINES:
                yield from held
                held = []
        elif line.endswith(_KERNEL_METADATA):
            held = [line]
        else:
            yield line
    yield from held


def _begin_module(header: str) -> _Draft:
    name, comma, rest = header.removeprefix("HloModule").partition(",")
    said = read_attributes(rest) if comma else {}
    draft = _Draft(has_header=True, name=name.strip())
    for key in ("num_partitions", "replica_count"):
        count = to_int(said[key]) if said.get(key, "").isdecimal() else 0
        if 0 < count <= MOST:
            draft.counts[key] = count
    if _COLLECTIVE.search(without_quoted(header)):
        draft.unreadable.append(header.strip())
    draft.chooses_output_shardings = said.get(_CHOOSES, "").startswith("{true")
    return draft


def _read_line(draft: _Draft, line: str) -> None:
    if not line:
        return
    if instruction := read_instruction(line):
        draft.instructions.append(instruction)
        draft.in_constant = (
            instruction.opcode == "constant" and find_closing(instruction.rest, 0) is None
        )
        if " = " in instruction.rest and _SECOND.search(without_quoted(instruction.rest)):
            draft.unreadable.append(line.strip())  # two lines that lost what parted them
    elif draft.table and (row := _TABLE_ROW.match(line)):
        draft.tables[draft.table][int(row[1])] = row[2]
    elif "=" in line and "(" in line and _COLLECTIVE.search(line):
        draft.unreadable.append(line.strip())
    elif line.startswith("}") or (not draft.in_constant and _END.match(line)):
        _close_computation(draft)
    elif line.strip() in TABLES:
        draft.table = line.strip()
        draft.tables[draft.table] = {}
    elif header := _COMPUTATION.match(line):
        _close_computation(draft)
        draft.table = ""
        draft.computation, draft.is_entry = header[2], bool(header[1])
    elif _LOOKS_DAMAGED.search(line) or (draft.instructions and _LONE_NAME.match(line)):
        draft.unreadable.append(line.strip())
    elif "})" in line:
        draft.in_constant = False


def read_instruction(line: str) -> Instruction | None:
    """Split one line into name, type, opcode and the rest, or return None where it has none."""
    if found := _INSTRUCTION.match(line):
        return Instruction(found[2], found[4], found[3], found[5], bool(found[1]))
    if not (start := _TUPLE_INSTRUCTION.match(line)):
        return None
    end = find_closing(line, start.end())
    if end is None or not (opcode := _OPCODE.match(line, end)):
        return None
    return Instruction(start[2], opcode[1], line[start.end() : end], opcode[2], bool(start[1]))


def _close_computation(draft: _Draft) -> None:
    if draft.instructions or draft.unreadable:
        name = draft.computation
        if name in draft.computations:  # two of one name: keep both, lose nothing
            name = f"{name}#{len(draft.computations)}"
        instructions = (*_list_short_elements(draft.instructions), *draft.instructions)
        draft.computations[name] = Computation(
            name, draft.is_entry, instructions, tuple(draft.unreadable)
        )
    draft.computation, draft.is_entry, draft.in_constant = "", False, False
    draft.instructions, draft.unreadable = [], []


def _list_short_elements(instructions: Sequence[Instruction]) -> Iterator[Instruction]:
    """Yield a get-tuple-element for each operand in the short form %tuple#1."""
    used: set[tuple[str, str]] = set()
    for instruction in instructions:
        if "#" in instruction.rest:
            used.update(_ELEMENT.findall(instruction.rest))
    if not used:
        return
    types = {i.name: split_outside(i.type[1:-1], ",") for i in instructions if i.type[:1] == "("}
    for name, index in sorted(used):
        if int(index) < len(types.get(name, ())):
            rest = f"(%{name}), index={index}"
            type_ = types[name][int(index)]
            yield Instruction(f"{name}#{index}", "get-tuple-element", type_, rest)


def _finish_module(draft: _Draft) -> Module:
    if draft.has_header and draft.computation:
        draft.unreadable.append(f"the text ends inside of {draft.computation}")
    elif draft.has_header and not any(c.is_entry for c in draft.computations.values()):
        draft.unreadable.append(f"module {draft.name} has no ENTRY: the text is cut off")
    _close_computation(draft)
    return Module(
        name=draft.name,
        num_partitions=draft.counts.get("num_partitions", 1 if draft.counts else None),
        replica_count=draft.counts.get("replica_count", 1 if draft.counts else None),
        computations=draft.computations,
        frames=read_frames(draft.tables),
        chooses_output_shardings=draft.chooses_output_shardings,
    )
