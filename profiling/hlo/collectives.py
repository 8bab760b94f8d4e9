"""Find every collective of an HLO module, with its operands, groups, trips and witnesses."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from txcore.profiling.hlo import attributes, custom_calls
from txcore.profiling.hlo.consumer import find_consumer, find_maker, full_name
from txcore.profiling.hlo.graph import Graph, Value
from txcore.profiling.hlo.groups import NO_GROUPS, Groups
from txcore.profiling.hlo.modes import mode_of, pairs_of_devices
from txcore.profiling.hlo.operands import Input, Words, find_witnesses, inputs_of, words_of
from txcore.profiling.hlo.read_groups import Pairs, parse_pairs
from txcore.profiling.hlo.scan import without_quoted
from txcore.profiling.hlo.text import KINDS, Instruction, Module, read_modules
from txcore.profiling.hlo.tpu_async import is_later_step
from txcore.profiling.hlo.trip_counts import ONCE, Trips, count_runs
from txcore.profiling.hlo.types import HloError, Shape, parse_shapes, to_int

_KIND_OF = {f"{kind}{start}": kind for kind in KINDS for start in ("", "-start")}
_START_OF = {f"{kind}-done": f"{kind}-start" for kind in KINDS}
_TRACES = ("replica_groups=", "source_target_pairs=", "custom_call_target=", "_xla_send_recv_")
# The second halves of pairs, and what takes their results apart.
_OTHER_HALVES = ("async-", "send-done", "recv-done", "get-tuple-element")
_PAIRS_OF_SEND = "_xla_send_recv_source_target_pairs"
_DIMS = re.compile(r"\{([\d,\s]*+)\}")
# Their result is n times the operand, or one n-th of it.
_SIZED_BY_SHAPES = ("all-gather", "reduce-scatter")
UNSIZED = "how many devices talk is not known: its module's header has no counts"
ALONE = "each device is alone in its group"


@dataclass(frozen=True, slots=True)
class Op:
    """One collective of a compiled program, as the compiler prints it.

    Attributes:
      name: the instruction's name.
      kind: HLO's name without "-start"; "custom-call" for a call that can communicate unseen,
        "unknown" for a line that could not be read.
      inputs: the arrays that each device sends in one execution.
      groups: the devices that talk to each other, by their place in the program's mesh; empty
        where the text does not give them, though `size` may be known.
      size: the devices in a group, where `groups` is empty and the shapes tell; else 0.
      pairs: a permute's (source, target) devices; then `groups` is empty.
      tags, marked, op_name, frames: what the line says about its origin.
      wanted_by, wanted_frames: op_name and source of the first op of another origin that uses the
        result, where the line does not say what the op was inserted for.
      target: the function that a custom call runs.
      dim: the array's dim that a gather or reduce-scatter is along; -1 of others.
      trips: executions in one call of the program.
      problem: why the line could not be read, or what it leaves open.
      computation: the name of its computation.
    """

    name: str
    kind: str
    inputs: tuple[Input, ...] = ()
    groups: Groups = NO_GROUPS
    size: int = 0
    pairs: Pairs = ()
    tags: tuple[str, ...] = ()
    marked: bool = False
    op_name: str = ""
    frames: tuple[tuple[str, int], ...] = ()
    wanted_by: str = ""
    wanted_frames: tuple[tuple[str, int], ...] = ()
    target: str = ""
    dim: int = -1
    trips: Trips = ONCE
    problem: str = ""
    computation: str = ""

    @property
    def operands(self) -> tuple[Shape, ...]:
        """Return the shapes of the inputs."""
        return tuple(i.shape for i in self.inputs)

    @property
    def group_size(self) -> int:
        """Return the size of the largest group; 0 where it is not known, as of a permute."""
        return self.groups.size or self.size

    @property
    def elements(self) -> int:
        """Return nccl-tests' S in elements: n x the operands' for an all-gather, else theirs."""
        return self._scale * sum(shape.elements for shape in self.operands)

    @property
    def bytes(self) -> int:
        """Return nccl-tests' S in bytes of the dtype on the wire."""
        return self._scale * sum(shape.bytes for shape in self.operands)

    @property
    def _scale(self) -> int:
        return self.group_size if self.kind == "all-gather" else 1


def find_collectives(text: str, *, devices: int | None = None) -> tuple[Op, ...]:
    """Read HLO text and return every collective in it, in the text's order.

    Args:
      text: one or more HLO modules.
      devices: how many devices the program runs on, where the text's header does not say; None
        where that is not known either.

    Returns:
      One `Op` for each collective; an async pair counts once. What looks like a collective and
      cannot be read is an `Op` of kind "unknown", never an exception.
    """
    return collectives_of(read_modules(text), devices=devices)


def collectives_of(modules: Iterable[Module], *, devices: int | None = None) -> tuple[Op, ...]:
    """Return every collective in modules that were read before, as `find_collectives`."""
    return tuple(op for module in modules for op in _find_in_module(module, devices))


def _find_in_module(module: Module, devices: int | None) -> Iterator[Op]:
    graph = Graph(module)
    trips = count_runs(graph)
    opcodes = frozenset(i.opcode for c in module.computations.values() for i in c.instructions)
    for name, computation in module.computations.items():
        context = _Context(graph, opcodes, name, devices, trips[name])
        for instruction in computation.instructions:
            if kind := _kind_to_count(instruction, context):
                yield _read_or_mark_unknown(instruction, kind, context)
        for line in computation.unreadable:
            problem = f"cannot be read: {line[:120]}"
            yield Op(line[:40], "unknown", problem=problem, computation=name)


@dataclass(frozen=True, slots=True)
class _Context:
    """The surroundings of an instruction; `computation` is the name of its computation."""

    graph: Graph
    opcodes: frozenset[str]
    computation: str
    devices: int | None
    trips: Trips


def _kind_to_count(instruction: Instruction, context: _Context) -> str | None:
    """Return the kind of collective that an instruction is, or None where it is none to count."""
    opcode = instruction.opcode
    if kind := _KIND_OF.get(opcode):
        if is_later_step(instruction, context.computation, context.graph):
            return None
        return None if _is_wrapper(instruction, kind, context.graph.module) else kind
    if started := _START_OF.get(opcode):
        return _half_of(started, context)
    if opcode in ("custom-call", "custom-call-start"):
        return "custom-call" if custom_calls.can_communicate(instruction) else None
    if opcode in ("send", "recv"):  # two halves of one transfer; only the send counts
        if "is_host_transfer=true" in instruction.rest:
            return None
        return "send" if opcode == "send" else _half_of("send", context)
    if opcode.startswith(_OTHER_HALVES) or not _has_trace(instruction.rest):
        return None
    return "unknown" if _has_trace(without_quoted(instruction.rest)) else None


def _has_trace(rest: str) -> bool:
    return any(trace in rest for trace in _TRACES)


def _half_of(counted: str, context: _Context) -> str | None:
    """Return None for the half of a pair that does not count, unless the other half was lost."""
    return None if {counted, "async-start"} & context.opcodes else "unknown"


def _is_wrapper(instruction: Instruction, kind: str, module: Module) -> bool:
    """Tell whether a -start only names a computation in which the collective is counted."""
    if not instruction.opcode.endswith("-start"):
        return False
    known = (name for name in instruction.callees if name in module.computations)
    bodies = (module.computations[name].instructions for name in known)
    return any(inner.opcode == kind for body in bodies for inner in body)


def _read_or_mark_unknown(instruction: Instruction, kind: str, context: _Context) -> Op:
    try:
        if kind == "unknown":
            raise HloError(f"unknown form {instruction.rest[:80]!r}")
        return _read_op(instruction, kind, context)
    except HloError as error:
        problem = f"{instruction.opcode[:40]}: {error}"
        name, trips = context.computation, context.trips
        return Op(instruction.name, "unknown", problem=problem, computation=name, trips=trips)


def _read_op(instruction: Instruction, kind: str, context: _Context) -> Op:
    graph = context.graph
    here = Value(graph.scope_of(context.computation), instruction)
    lines = find_witnesses(here, graph)
    words = words_of(lines)
    words = Words(words.tag, full_name(words.op_name, here, graph), words.marked)
    if kind == "custom-call":
        inputs: tuple[Input, ...] = ()
    else:
        inputs = _find_inputs(instruction, kind, here, words, graph)
    says = _words_or_those_of_inputs(words, inputs)
    is_silent = words.marked or "/" not in words.op_name or words.op_name.endswith("/shard_map")
    by_user = (
        _describe_user(here, graph) if is_silent and inputs else {}
    )  # else it says what it is for
    if _PAIRS_OF_SEND in instruction.frontend and kind == "send":
        kind = "collective-permute"  # pipelined; XLA for GPU writes it as sends and receives
    return Op(
        name=instruction.name,
        kind=kind,
        marked=words.marked,
        frames=_first_known_frames(lines, graph.module),
        target=attributes.custom_call_target(instruction) if kind == "custom-call" else "",
        computation=context.computation,
        trips=context.trips,
        dim=_read_dim(instruction, kind),
        **says,
        **by_user,
        **_read_partners(instruction, kind, says["inputs"], context),
    )


def _read_dim(instruction: Instruction, kind: str) -> int:
    said = _DIMS.fullmatch(instruction.attributes.get("dimensions", ""))
    is_one = kind in _SIZED_BY_SHAPES and said is not None and said[1].strip().isdecimal()
    return to_int(said[1].strip()) if is_one and said is not None else -1


def _find_inputs(
    instruction: Instruction, kind: str, here: Value, words: Words, graph: Graph
) -> tuple[Input, ...]:
    """Return what is sent; other operands are buffers to write to, offsets and tokens."""
    # A permute in place names slices of its first operand; a combined one has many whole ones.
    slices = instruction.attributes.get("slice_sizes") if kind == "collective-permute" else None
    is_first_alone = slices is not None or kind in ("ragged-all-to-all", "send")
    sent = instruction.operands[:1] if is_first_alone else instruction.operands
    inputs = inputs_of(here, sent, words, graph)
    return inputs if slices is None else _slice_inputs(inputs, slices)


def _read_partners(
    instruction: Instruction, kind: str, inputs: tuple[Input, ...], context: _Context
) -> dict[str, Any]:
    """Return the devices that talk to each other, as the op's groups or pairs, and what is open."""
    said, graph = instruction.attributes, context.graph
    if kind in ("custom-call", "send"):
        return {}
    mode = mode_of(kind, said)
    if kind == "collective-permute":
        pairs = said.get("source_target_pairs") or instruction.frontend.get(_PAIRS_OF_SEND)
        if pairs is None:
            raise HloError("no source_target_pairs")
        allow = graph.allows_listing
        return {"pairs": pairs_of_devices(parse_pairs(pairs), mode, graph.module, allow)}
    if (printed := said.get("replica_groups")) is None:
        raise HloError("no replica_groups")
    if "device_ids" in said:  # of the mesh form, whose comma parts it in two
        printed += f", device_ids={said['device_ids']}"
    groups = graph.groups_as_devices(printed, mode, context.devices)
    if not groups:
        size = _size_by_shapes(instruction, kind, inputs)
        return {"size": size, "problem": "" if size else UNSIZED}
    is_alone = groups.size == 1 and groups.devices > 1
    return {"groups": groups, "problem": ALONE if is_alone else ""}


def _size_by_shapes(instruction: Instruction, kind: str, inputs: tuple[Input, ...]) -> int:
    """Return n from the shapes of operands and results, or 0 where they do not determine it."""
    if kind == "all-to-all" and len(inputs) > 1:
        return len(inputs)
    if kind not in _SIZED_BY_SHAPES:
        return 0
    shapes, count = parse_shapes(instruction.type), len(inputs)
    results = shapes[count : 2 * count] if instruction.opcode.endswith("-start") else shapes
    sent = sum(one.shape.elements for one in inputs)
    got = sum(shape.elements for shape in results or shapes)
    small, large = (sent, got) if kind == "all-gather" else (got, sent)
    return large // small if small and large % small == 0 else 0


def _slice_inputs(inputs: tuple[Input, ...], printed: str) -> tuple[Input, ...]:
    """Return what a permute in place sends: slices of the arrays of its first operand, in order."""
    sizes = [parse_shapes(f"u8[{dims}]")[0] for dims in _DIMS.findall(printed)]
    if not sizes or len(sizes) % len(inputs):
        raise HloError(f"slice_sizes={printed[:40]} of {len(inputs)} arrays")
    of_each = len(sizes) // len(inputs)
    whole = (inputs[i // of_each] for i in range(len(sizes)))
    return tuple(
        replace(one, shape=replace(one.shape, dims=size.dims), pieces=())
        for one, size in zip(whole, sizes, strict=True)
    )


def _describe_user(here: Value, graph: Graph) -> dict[str, Any]:
    """Name the op that uses the data; at a program's end, where none does, the op that made it."""
    user = find_consumer(here, graph)
    made = find_maker(here) if user is None else None
    near = user or made
    # Where the compiler chose the results' shardings, it gathers for what made them.
    named = user or (made if graph.module.chooses_output_shardings else None)
    frames = tuple(attributes.source_frames(near, graph.module)) if near else ()
    return {"wanted_by": attributes.op_name(named) if named else "", "wanted_frames": frames}


def _words_or_those_of_inputs(words: Words, inputs: tuple[Input, ...]) -> dict[str, Any]:
    """Use the words of an op's arrays where it has none: older XLA for GPU merged ops silently."""
    tags = tuple(t for t in words.tag.split(",") if t)
    if tags or words.op_name:
        return {"tags": tags, "op_name": words.op_name, "inputs": inputs}
    said = [*inputs, *(piece for i in inputs for piece in i.pieces)]
    tags = tuple(dict.fromkeys(i.tag for i in said if i.tag))
    op_name = next((i.op_name for i in said if i.op_name), "")
    if len(inputs) == 1 and (tags or op_name):
        inputs = (replace(inputs[0], tag=",".join(tags), op_name=op_name),)
    return {"tags": tags, "op_name": op_name, "inputs": inputs}


def _first_known_frames(lines: list[Instruction], module: Module) -> tuple[tuple[str, int], ...]:
    each = (tuple(attributes.source_frames(line, module)) for line in lines)
    return next((frames for frames in each if frames), ())
