"""Look instructions up by name, use and caller; each table is made on first use."""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

from txcore.profiling.hlo import attributes
from txcore.profiling.hlo.groups import Groups
from txcore.profiling.hlo.modes import groups_of_devices
from txcore.profiling.hlo.read_groups import parse_groups
from txcore.profiling.hlo.text import Computation, Instruction, Module
from txcore.profiling.hlo.types import Shape, parse_shapes, to_int

STEP = "async_collective_fusion_config"
CALLERS = frozenset({"fusion", "call", "while", "conditional", "custom-call", "map"})


@dataclass(frozen=True, slots=True)
class Call:
    """`instruction`, in the computation named `caller`, runs the one named `callee`."""

    caller: str
    callee: str
    instruction: Instruction


@dataclass(frozen=True)
class Graph:
    """Lookups over the instructions of one module."""

    module: Module
    _scopes: dict[str, "Scope"] = field(default_factory=dict)
    _groups: dict[tuple[str, str], Groups] = field(default_factory=dict)
    _done: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @cached_property
    def _lines(self) -> int:
        return sum(len(c.instructions) for c in self.module.computations.values())

    def allows_steps(self, steps: int) -> bool:
        """Tell whether that many steps more may be done from value to value.

        Real modules come nowhere near the limit. In a module that leads each of its collectives
        through the same thousand lines, the witnesses beyond the limit are ignored.
        """
        self._done["steps"] += steps
        return self._done["steps"] <= 50_000 + 8 * self._lines

    def allows_listing(self, devices: int) -> bool:
        """Tell whether the text's meaning may be listed for that many more devices."""
        if may := self._done["devices"] + devices <= (1 << 20) + 16 * self._lines:
            self._done["devices"] += devices
        return may

    def groups_as_devices(self, printed: str, mode: str, devices: int | None) -> Groups:
        """Return the groups of devices that printed groups mean; each reading is cached.

        Args:
          printed: as for `parse_groups`.
          mode, devices: as for `groups_of_devices`.

        Raises:
          HloError: as both of these.
        """
        if (found := self._groups.get((printed, mode))) is None:
            allow = self.allows_listing
            read = parse_groups(printed, allow)
            found = groups_of_devices(read, mode, self.module, devices, allow)
            self._groups[printed, mode] = found
        return found

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """Every call in the module; also those of fusions, loops and async starts."""
        known = self.module.computations
        calls: list[Call] = []
        for caller in known.values():
            for instruction in caller.instructions:
                # An async pair's -done and -update name the computation of their -start again.
                if instruction.opcode in CALLERS or instruction.opcode.endswith("-start"):
                    called = (name for name in instruction.callees if name in known)
                    calls += [Call(caller.name, name, instruction) for name in called]
        return tuple(calls)

    @cached_property
    def _callers(self) -> dict[str, list[Call]]:
        callers = defaultdict(list)
        for call in self.calls:
            callers[call.callee].append(call)
        return callers

    def only_caller(self, computation: str) -> Call | None:
        """Return what runs a computation, or None where nothing or several do."""
        callers = self._callers.get(computation, [])
        return callers[0] if len(callers) == 1 else None

    def called_scope(self, instruction: Instruction) -> "Scope | None":
        """Return the first computation that an instruction runs, or None where it runs none."""
        names = instruction.callees
        return self.scope_of(names[0]) if names and names[0] in self.module.computations else None

    @cached_property
    def _steps(self) -> "dict[tuple[str, str, str], dict[str, list[Value]]]":
        found: dict[tuple[str, str, str], dict[str, list[Value]]] = defaultdict(dict)
        is_step: dict[int, bool] = {}  # one may go into many calls
        for name, computation in self.module.computations.items():
            for instruction in computation.instructions:
                if instruction.opcode != "custom-call":
                    continue
                target = attributes.custom_call_target(instruction)
                for value in self.scope_of(name).operands_of(instruction):
                    step = value.instruction
                    if _is_step(step, is_step):
                        key = target, step.opcode, attributes.channel_id(step)
                        found[key].setdefault(name, []).append(value)
        return found

    def steps_into(self, target: str, like: Instruction) -> "dict[str, list[Value]]":
        """Return the steps that go into the calls of a target, by computation.

        Only steps with the opcode and channel of `like` count.
        """
        return self._steps.get((target, like.opcode, attributes.channel_id(like)), {})

    def scope_of(self, computation: str) -> "Scope":
        """Return the lookups within one computation."""
        if (found := self._scopes.get(computation)) is None:
            found = self._scopes[computation] = Scope(self.module.computations[computation])
        return found


@dataclass(frozen=True)
class Scope:
    """Lookups over the instructions of one computation."""

    computation: Computation

    def operands_of(self, instruction: Instruction) -> "list[Value]":
        """Return the values of an instruction's operands; undefined names are left out."""
        found = (self.by_name.get(name) for name in operand_names(instruction))
        return [Value(self, operand) for operand in found if operand is not None]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Each instruction by its name."""
        return {i.name: i for i in self.computation.instructions}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that use a value, by the value's name."""
        users = defaultdict(list)
        for instruction in self.computation.instructions:
            for name in dict.fromkeys(operand_names(instruction)):
                users[name].append(instruction)
        return users

    @cached_property
    def elements(self) -> dict[str, dict[int, Instruction]]:
        """For each tuple, by its name: the instructions that take its elements, by index."""
        elements: dict[str, dict[int, Instruction]] = defaultdict(dict)
        for instruction in self.computation.instructions:
            if instruction.opcode == "get-tuple-element" and (index := index_of(instruction)) >= 0:
                for name in operand_names(instruction)[:1]:
                    elements[name].setdefault(index, instruction)
        return elements

    @cached_property
    def dones(self) -> dict[str, Instruction]:
        """For each asynchronous start, by its name: the -done or -update that continues it."""
        dones: dict[str, Instruction] = {}
        for instruction in self.computation.instructions:
            if instruction.opcode.endswith(("-done", "-update")):
                dones |= dict.fromkeys(operand_names(instruction)[:1], instruction)
        return dones

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The computation's parameters by their number."""
        found = (i for i in self.computation.instructions if i.opcode == "parameter")
        numbered = ((i.rest[1:].split(")")[0], i) for i in found)
        return {to_int(number): i for number, i in numbered if number.isdecimal()}

    @cached_property
    def _shapes(self) -> dict[str, tuple[Shape, ...]]:
        return {}

    def shapes_of(self, instruction: Instruction) -> tuple[Shape, ...]:
        """Return the arrays of an instruction's type.

        Raises:
          HloError: it has none, or one that is not known.
        """
        if (found := self._shapes.get(instruction.name)) is None:
            found = self._shapes[instruction.name] = parse_shapes(instruction.type)
        return found

    @cached_property
    def root(self) -> Instruction | None:
        """The instruction whose value the computation returns."""
        instructions = self.computation.instructions
        marked = (i for i in instructions if i.is_root)
        return next(marked, instructions[-1] if instructions else None)


@dataclass(frozen=True, slots=True)
class Value:
    """What an instruction computes, in its computation."""

    scope: Scope
    instruction: Instruction


def _is_step(instruction: Instruction, known: dict[int, bool]) -> bool:
    """Tell whether XLA for TPU carries an op out in steps; each line is read once."""
    if id(instruction) not in known:
        known[id(instruction)] = STEP in instruction.rest
    return known[id(instruction)]


def operand_names(instruction: Instruction) -> tuple[str, ...]:
    """Return the names of an instruction's operands; none where they cannot be read."""
    return instruction.operand_names


def index_of(instruction: Instruction) -> int:
    """Return which element of a tuple an instruction takes, -1 where it does not say."""
    index = instruction.attributes.get("index", "")
    return to_int(index) if index.isdecimal() else -1
