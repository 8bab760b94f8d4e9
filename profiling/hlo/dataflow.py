"""Follow a value through a module: back to what made it, on to what reads it."""

import itertools
import re
from collections.abc import Iterator

from txcore.profiling.hlo.graph import Graph, Scope, Value, index_of, operand_names
from txcore.profiling.hlo.text import Instruction

VIEWS = frozenset({"bitcast", "copy", "reshape", "transpose"})
_SAME_ORDER = frozenset({"bitcast", "copy", "reshape", "convert"})
_RUNS_ITSELF_OFTEN = frozenset({"while", "conditional"})
_IS_FLAT = re.compile(r"\w+\[\d+\]")
_NUMBER = re.compile(r"\((\d{1,9})\)")
_FARTHEST = 32  # steps to follow; a damaged text may lead in a circle


def follow_to_result(value: Value, graph: Graph) -> list[Value]:
    """Return a value and what continues it: its -done, its wrapper's start and -done."""
    found = [value]
    while len(found) < _FARTHEST:
        value = found[-1]
        if done := value.scope.dones.get(value.instruction.name):
            found.append(Value(value.scope, done))
        elif value.scope.root is value.instruction and (
            outer := _value_of_caller(value.scope, graph)
        ):
            found.append(outer)
        else:
            break
    return found


def _value_of_caller(scope: Scope, graph: Graph) -> Value | None:
    """Return the one instruction that runs a computation once and returns its result."""
    call = graph.only_caller(scope.computation.name)
    if call is None or call.instruction.opcode in _RUNS_ITSELF_OFTEN:
        return None
    return Value(graph.scope_of(call.caller), call.instruction)


def find_concatenation(value: Value, graph: Graph) -> Value | None:
    """Follow a value back to the flat concatenation that made it, or return None."""
    element = 0  # which one of a tuple is followed
    for _ in range(_FARTHEST):
        maker = value.instruction
        if maker.opcode == "concatenate":
            return value if _IS_FLAT.match(maker.type) else None
        if maker.opcode == "get-tuple-element":
            element = index_of(maker)
        before = _step_back(value, element, graph)
        if before is None:
            return None
        value = before
    return None


def _step_back(value: Value, element: int, graph: Graph) -> Value | None:
    """Return the value that this one renames, or is an element of, or None."""
    maker = value.instruction
    if maker.opcode in ("fusion", "call"):
        inner = graph.called_scope(maker)
        return Value(inner, inner.root) if inner and inner.root else None
    if maker.opcode == "parameter":
        outer, number = _value_of_caller(value.scope, graph), _NUMBER.match(maker.rest)
        return _operand_at(outer, int(number[1])) if outer and number else None
    if maker.opcode == "tuple":
        return _operand_at(value, element)
    if maker.opcode in _SAME_ORDER or maker.opcode == "get-tuple-element":
        return _operand_at(value, 0)
    return None


def _operand_at(value: Value, place: int) -> Value | None:
    names = operand_names(value.instruction)
    found = value.scope.by_name.get(names[place]) if 0 <= place < len(names) else None
    return Value(value.scope, found) if found else None


def find_uses(value: Value, graph: Graph) -> Iterator[Value]:
    """Yield the uses of a value, also inside of fusions and past instructions that rename it."""
    reached, seen = [value], set()
    while reached:
        value = reached.pop()
        for user in value.scope.users.get(value.instruction.name, ()):
            if not graph.allows_steps(1 + len(operand_names(user))):
                return
            for use in _enter_fusion(value, user, graph):
                key = (use.scope.computation.name, use.instruction.name)
                if key not in seen:
                    seen.add(key)
                    yield use
                    if use.instruction.opcode in (*_SAME_ORDER, "parameter"):
                        reached.append(use)


def _enter_fusion(value: Value, user: Instruction, graph: Graph) -> list[Value]:
    """Return a user of a value; in place of a fusion, its parameters that hold the value."""
    inner = graph.called_scope(user) if user.opcode in ("fusion", "call") else None
    if inner is None:
        return [Value(value.scope, user)]
    places = [i for i, n in enumerate(operand_names(user)) if n == value.instruction.name]
    return [Value(inner, inner.parameters[i]) for i in places if i in inner.parameters]


def find_views(value: Value, graph: Graph) -> Iterator[Value]:
    """Yield a value and its rearrangements (reshapes, transposes, copies); nearest first."""
    reached = [value]
    for value in reached:
        yield value
        if len(reached) > _FARTHEST:
            break
        if value.instruction.opcode in VIEWS or value.instruction.opcode == "slice":
            reached += follow_to_result(value, graph)[1:]
        users = value.scope.users.get(value.instruction.name, ())
        near = itertools.islice(users, _FARTHEST)
        reached += [Value(value.scope, user) for user in near if user.opcode in VIEWS]
