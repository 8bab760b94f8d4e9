"""Find every collective of an HLO module, with its operands, groups, trips and witnesses."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from txcore.profiling.hlo import attributes, opaque
from txcore.profiling.hlo.graph import Graph, Value
from txcore.profiling.hlo.groups import Groups, canonical, parse_groups, parse_pairs
from txcore.profiling.hlo.inputs import Input, inputs_of, witnesses, words_of
from txcore.profiling.hlo.stepwise import is_later_step
from txcore.profiling.hlo.text import KINDS, Instruction, Module, read_modules
from txcore.profiling.hlo.trips import ONCE, Trips, runs
from txcore.profiling.hlo.types import HloError, Shape, split_outside
from txcore.profiling.hlo.wanted import full_name, maker, wanted_by

_KIND_OF = {f"{kind}{start}": kind for kind in KINDS for start in ("", "-start")}
_START_OF = {f"{kind}-done": f"{kind}-start" for kind in KINDS}
_GROUPS = "replica_groups="
_PAIRS = "source_target_pairs="
_TARGET = "custom_call_target="
_SENT = "_xla_send_recv_"
# The second halves of pairs, and what takes their results apart.
_OTHER_HALVES = ("async-", "send-done", "recv-done", "get-tuple-element")
_PAIRS_OF_SEND = "_xla_send_recv_source_target_pairs="


@dataclass(frozen=True, slots=True)
class Op:
    """One collective of a compiled program, as the compiler prints it.

    kind: HLO's name without "-start"; "custom-call" for a call that can communicate unseen,
      "unknown" for a line that could not be read (then `problem` says why).
    inputs: the arrays each device puts in, of one execution.
    groups: the devices that talk to each other, by their place in the program's mesh.
    pairs: a permute's (source, target) devices; then `groups` is empty.
    tags, marked, op_name, frames: what the line says about where it comes from.
    wanted_by, wanted_frames: op_name and source of the first op of another origin that uses the
      result, where the line does not say what it was inserted for.
    computation: the name of the computation that it is in.
    """

    name: str
    kind: str
    inputs: tuple[Input, ...] = ()
    groups: Groups = ()
    pairs: tuple[tuple[int, int], ...] = ()
    tags: tuple[str, ...] = ()
    marked: bool = False
    op_name: str = ""
    frames: tuple[tuple[str, int], ...] = ()
    wanted_by: str = ""
    wanted_frames: tuple[tuple[str, int], ...] = ()
    target: str = ""
    trips: Trips = ONCE
    problem: str = ""
    computation: str = ""

    @property
    def operands(self) -> tuple[Shape, ...]:
        """Return the shapes of the inputs."""
        return tuple(i.shape for i in self.inputs)

    @property
    def group_size(self) -> int:
        """Return the size of the largest group; of a permute it is not known here, and 0."""
        return max((len(group) for group in self.groups), default=0)

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


def find_collectives(text: str, *, devices: int = 1) -> tuple[Op, ...]:
    """Read HLO text and return every collective in it, in the text's order.

    Args:
      text: one or more HLO modules.
      devices: how many devices the program runs on, where the text's header does not say.

    Returns:
      One `Op` for each collective; an async pair counts once. What looks like a collective and
      cannot be read is an `Op` of kind "unknown", never an exception.
    """
    return tuple(op for module in read_modules(text) for op in _of_module(module, devices))


def _of_module(module: Module, devices: int) -> Iterator[Op]:
    graph = Graph(module)
    trips = runs(graph)
    opcodes = frozenset(i.opcode for c in module.computations.values() for i in c.instructions)
    devices = max(devices, module.num_partitions * module.replica_count)
    for name, computation in module.computations.items():
        context = _Context(graph, opcodes, name, devices)
        for instruction in computation.instructions:
            if kind := _kind(instruction, context):
                op = _read(instruction, kind, context)
                yield replace(op, trips=trips[name], computation=name)
        for line in computation.unreadable:
            problem = f"cannot be read: {line[:120]}"
            yield Op(line[:40], "unknown", problem=problem, computation=name)


@dataclass(frozen=True, slots=True)
class _Context:
    """Where an instruction stands: in the computation of that name."""

    graph: Graph
    opcodes: frozenset[str]
    computation: str
    devices: int


def _kind(instruction: Instruction, context: _Context) -> str | None:
    """Return the kind of collective that an instruction is, or None where it is none to count."""
    opcode = instruction.opcode
    if kind := _KIND_OF.get(opcode):
        if is_later_step(instruction, context.computation, context.graph):
            return None
        return None if _is_wrapper(instruction, kind, context.graph.module) else kind
    if started := _START_OF.get(opcode):
        return _half_of(started, context)
    if opcode in ("custom-call", "custom-call-start"):
        return "custom-call" if opaque.can_communicate(instruction.rest) else None
    if opcode in ("send", "recv"):  # two halves of one transfer; only the send counts
        if "is_host_transfer=true" in instruction.rest:
            return None
        return "send" if opcode == "send" else _half_of("send", context)
    rest = instruction.rest
    is_like_one = _GROUPS in rest or _PAIRS in rest or _TARGET in rest or _SENT in rest
    return "unknown" if is_like_one and not opcode.startswith(_OTHER_HALVES) else None


def _half_of(counted: str, context: _Context) -> str | None:
    """Return None for the half of a pair that does not count, unless the other half was lost."""
    return None if {counted, "async-start"} & context.opcodes else "unknown"


def _is_wrapper(instruction: Instruction, kind: str, module: Module) -> bool:
    """Tell whether a -start only names a computation in which the collective is counted."""
    if not instruction.opcode.endswith("-start"):
        return False
    called = (module.computations.get(name) for name in attributes.callees(instruction))
    return any(inner.opcode == kind for c in called if c for inner in c.instructions)


def _read(instruction: Instruction, kind: str, context: _Context) -> Op:
    try:
        if kind == "unknown":
            raise HloError(f"unknown form {instruction.rest[:80]!r}")
        return _read_op(instruction, kind, context)
    except HloError as error:
        return Op(instruction.name, "unknown", problem=f"{instruction.opcode}: {error}")


def _read_op(instruction: Instruction, kind: str, context: _Context) -> Op:
    operands, rest = attributes.split(instruction)
    here = Value(context.graph.scope(context.computation), instruction)
    lines = witnesses(here, context.graph)
    words = words_of(lines)
    words = replace(words, op_name=full_name(words.op_name, here, context.graph))
    op = Op(
        name=instruction.name,
        kind=kind,
        tags=tuple(t for t in words.tag.split(",") if t),
        marked=words.marked,
        op_name=words.op_name,
        frames=_frames(lines, context.graph.module),
        target=attributes.custom_call_target(rest),
    )
    if kind == "custom-call":
        return op
    if words.marked or "/" not in words.op_name or words.op_name.endswith("/shard_map"):
        op = _with_user(op, here, context.graph)  # else it says itself what it is for
    inputs = inputs_of(here, _sent(operands, rest, kind), words, context.graph)
    op = _with_words_of(replace(op, inputs=inputs))
    if kind == "collective-permute":
        return replace(op, pairs=parse_pairs(_value(rest, _PAIRS)))
    if kind == "send":
        # XLA for GPU writes a permute as sends and receives where it pipelines it.
        is_permute = _PAIRS_OF_SEND in rest
        pairs = parse_pairs(_value(rest, _PAIRS_OF_SEND)) if is_permute else ()
        return replace(op, kind="collective-permute" if is_permute else kind, pairs=pairs)
    groups = parse_groups(_value(rest, _GROUPS), context.devices)
    return replace(op, groups=_on_devices(groups, rest, kind, context.graph.module))


def _with_user(op: Op, here: Value, graph: Graph) -> Op:
    """Name what wanted the data; at a program's end, where that is nothing, what made it."""
    user = wanted_by(here, graph)
    made = maker(here) if user is None else None
    near = user or made
    # Where the compiler chose the results' shardings, it gathers for what made them.
    named = user or (made if graph.module.chooses_output_shardings else None)
    frames = tuple(attributes.source_frames(near.rest, graph.module)) if near else ()
    return replace(
        op, wanted_by=attributes.op_name(named.rest) if named else "", wanted_frames=frames
    )


def _with_words_of(op: Op) -> Op:
    """Let a silent op speak with its arrays' words: older XLA for GPU merged them without any."""
    if op.tags or op.op_name:
        return op
    said = [*op.inputs, *(piece for i in op.inputs for piece in i.pieces)]
    tags = tuple(dict.fromkeys(i.tag for i in said if i.tag))
    op_name = next((i.op_name for i in said if i.op_name), "")
    inputs = op.inputs
    if len(inputs) == 1:
        inputs = (replace(inputs[0], tag=",".join(tags), op_name=op_name),)
    return replace(op, tags=tags, op_name=op_name, inputs=inputs)


def _frames(lines: list[Instruction], module: Module) -> tuple[tuple[str, int], ...]:
    each = (tuple(attributes.source_frames(line.rest, module)) for line in lines)
    return next((frames for frames in each if frames), ())


def _sent(operands: str, rest: str, kind: str) -> list[str]:
    """Return the operands that are sent; others are buffers to write to, offsets and tokens."""
    parts = split_outside(operands, ",")
    # An in-place permute names a slice of its first operand; a combined one has many whole ones.
    in_place_permute = kind == "collective-permute" and "slice_sizes=" in rest
    return parts[:1] if in_place_permute or kind in ("ragged-all-to-all", "send") else parts


def _value(rest: str, key: str) -> str:
    """Return what follows `key`, without leading spaces."""
    start = rest.find(key)
    if start < 0:
        raise HloError(f"no {key[:-1]}")
    return rest[start + len(key) :].lstrip()


def _on_devices(groups: Groups, rest: str, kind: str, module: Module) -> Groups:
    """Turn groups of replicas or of partitions into groups of devices.

    XLA numbers device (replica, partition) as replica x partitions + partition. Groups are of
    devices with use_global_device_ids, of replicas (each partition by itself) without a channel;
    with a channel alone of replicas with all their partitions, but for an all-to-all of partitions.
    """
    partitions, replicas = module.num_partitions, module.replica_count
    if "use_global_device_ids=true" in rest or replicas == 1:
        return groups
    if "channel_id=" not in rest:
        spread = [[[r * partitions + p for r in g] for p in range(partitions)] for g in groups]
    elif kind in ("all-to-all", "ragged-all-to-all", "collective-broadcast"):
        spread = [[[r * partitions + p for p in g] for r in range(replicas)] for g in groups]
    else:
        spread = [[[r * partitions + p for r in g for p in range(partitions)]] for g in groups]
    return canonical(devices for group in spread for devices in group)
