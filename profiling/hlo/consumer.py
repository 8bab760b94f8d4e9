"""Find the op that a collective was inserted for.

A collective that the partitioner inserts on an argument has the argument's name, or none. It was
inserted for the first instruction after it that has a path of jax's own.
"""

from txcore.profiling.hlo import attributes
from txcore.profiling.hlo.custom_calls import moves_elements
from txcore.profiling.hlo.dataflow import follow_to_result
from txcore.profiling.hlo.graph import Graph, Value, operand_names
from txcore.profiling.hlo.text import Instruction

_FARTHEST = 64  # instructions to look at; a damaged text may lead in a circle
# They leave elements as they are, or are the collective's own parts.
_MOVES = frozenset(
    ("parameter", "tuple", "get-tuple-element", "bitcast", "copy", "reshape", "transpose")
    + ("broadcast", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad")
    + ("convert", "constant", "iota", "partition-id", "replica-id", "opt-barrier", "call")
    + ("all-gather", "all-to-all", "all-reduce", "collective-permute", "reduce-scatter")
    + ("all-gather-start", "all-gather-done", "all-reduce-start", "all-reduce-done")
    + ("collective-permute-start", "collective-permute-done", "copy-start", "copy-done")
    + ("async-start", "async-update", "async-done", "add-dependency")
)
_LONGEST = 4096  # characters of a caller's path


def find_consumer(collective: Value, graph: Graph) -> Instruction | None:
    """Return the nearest instruction that uses a value and has another path; None without one.

    One with the collective's own path that computes is what it was inserted for, too: of an
    operand, where a collective that follows the operation has its name as well.
    """
    own = attributes.metadata_text(collective.instruction)
    has_path = "/" in attributes.op_name(collective.instruction)
    reached = [collective]
    seen = {collective.instruction.name}
    for value in reached:
        for after in (*follow_to_result(value, graph)[1:], *_nearest_users(value)):
            says = attributes.metadata_text(after.instruction)
            if says != own and "/" in attributes.op_name(after.instruction):
                return after.instruction
            if has_path and says == own and _computes(after, graph):
                return after.instruction
            if len(reached) >= _FARTHEST:
                break
            if after.instruction.name not in seen:
                seen.add(after.instruction.name)
                reached.append(after)
    return None


def _computes(value: Value, graph: Graph) -> bool:
    """Tell whether an instruction, or one that is fused into it, does more than move elements."""
    opcode = value.instruction.opcode
    if opcode == "custom-call":
        return not moves_elements(value.instruction)
    if opcode != "fusion":
        return opcode not in _MOVES
    own = attributes.op_name(value.instruction)
    called = (graph.module.computations.get(name) for name in value.instruction.callees)
    return any(
        inside.opcode not in _MOVES and attributes.op_name(inside) == own
        for computation in called
        if computation is not None
        for inside in computation.instructions
    )


def find_maker(collective: Value) -> Instruction | None:
    """Return the nearest instruction that computes a collective's operand and has a path."""
    value = collective.instruction
    for _ in range(_FARTHEST):
        names = operand_names(value)
        found = collective.scope.by_name.get(names[0]) if names else None
        if found is None or "/" in attributes.op_name(found):
            return found
        value = found
    return None


def full_name(op_name: str, value: Value, graph: Graph) -> str:
    """Return an op_name after its callers' names, as XLA writes it once a call is inlined.

    Right after partitioning, the body of a shard_map is a computation of its own, and its ops have
    names relative to it: "psum", which could be the name of an argument too.
    """
    scope = value.scope
    for _ in range(_FARTHEST):
        call = graph.only_caller(scope.computation.name)
        if call is None or not op_name or op_name.startswith("jit("):
            break
        scope = graph.scope_of(call.caller)
        if call.instruction.opcode == "call":
            outer = attributes.op_name(call.instruction)
            is_path = "/" in outer and len(outer) + len(op_name) <= _LONGEST
            op_name = f"{outer}/{op_name}" if is_path else op_name
    return op_name


def _nearest_users(value: Value) -> list[Value]:
    users = value.scope.users.get(value.instruction.name, ())
    return [Value(value.scope, user) for user in users[:_FARTHEST]]
