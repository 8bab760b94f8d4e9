"""Count the trips of a loop that counts up to a bound, where the compiler does not print them.

XLA for TPU prints no `known_trip_count`. What jax's scan and fori_loop compile to can be read from
the loop itself: its counter starts at a constant, grows by one and is less than a constant.
"""

import re
from dataclasses import dataclass

from txcore.profiling.hlo.graph import Graph, Scope, index_of, operand_names
from txcore.profiling.hlo.text import Instruction, operand_name
from txcore.profiling.hlo.types import to_int

_SAME_VALUE = ("copy", "bitcast", "reshape", "copy-done", "copy-start", "opt-barrier")
_CONSTANT = re.compile(r"\((-?)(\d+)\)")
_FARTHEST = 64  # instructions to look at; a damaged text may lead in a circle


@dataclass(frozen=True, slots=True)
class _Carried:
    """The element of a loop's tuple with this number."""

    index: int


@dataclass(frozen=True, slots=True)
class _Loop:
    """A loop: the instruction's own scope, and those of what it runs."""

    instruction: Instruction
    outside: Scope
    condition: Scope
    body: Scope


def count_trips(instruction: Instruction, scope: Scope, graph: Graph) -> int | None:
    """Return how often a while loop runs, or None where it does not count up to a bound.

    Args:
      instruction: the loop.
      scope: the computation that it is in.
      graph: its module.
    """
    said = instruction.attributes
    names = [operand_name(said.get(key, "")) for key in ("condition", "body")]
    if not all(name in graph.module.computations for name in names):
        return None
    loop = _Loop(instruction, scope, graph.scope_of(names[0]), graph.scope_of(names[1]))
    test = loop.condition.root
    if test is None or test.opcode != "compare" or test.attributes.get("direction") != "LT":
        return None
    compared = [_read_value(name, loop.condition) for name in operand_names(test)]
    counter, bound = compared if len(compared) == 2 else (None, None)
    if not isinstance(counter, _Carried) or not _grows_by_one(counter, loop.body):
        return None
    if isinstance(bound, _Carried):
        is_kept = _read_value(_name_after_trip(bound, loop.body), loop.body) == bound
        bound = _value_before_loop(bound, loop) if is_kept else None
    first = _value_before_loop(counter, loop)
    return max(0, bound - first) if isinstance(bound, int) and isinstance(first, int) else None


def _read_value(name: str | None, scope: Scope) -> int | _Carried | None:
    """Return the constant or carried element behind a name, or None where it is neither."""
    instruction = _find_origin(name, scope)
    if instruction is None:
        return None
    if instruction.opcode == "constant" and (number := _CONSTANT.match(instruction.rest)):
        return to_int(number[2]) * (-1 if number[1] else 1)
    if instruction.opcode == "get-tuple-element" and (index := index_of(instruction)) >= 0:
        whole = _find_origin(next(iter(operand_names(instruction)), None), scope)
        is_argument = whole is not None and whole.opcode == "parameter"
        return _Carried(index) if is_argument else None
    return None


def _find_origin(name: str | None, scope: Scope) -> Instruction | None:
    """Return the instruction behind a name, past those that leave its value as it is."""
    for _ in range(_FARTHEST):
        instruction = scope.by_name.get(name or "")
        if instruction is None or instruction.opcode not in _SAME_VALUE:
            return instruction
        name = next(iter(operand_names(instruction)), None)
    return None


def _grows_by_one(counter: _Carried, body: Scope) -> bool:
    step = _find_origin(_name_after_trip(counter, body), body)
    if step is None or step.opcode != "add":
        return False
    added = [_read_value(name, body) for name in operand_names(step)]
    return added in ([counter, 1], [1, counter])


def _name_after_trip(carried: _Carried, body: Scope) -> str | None:
    root = body.root
    return _name_of_element(root.name if root is not None else None, carried, body)


def _value_before_loop(carried: _Carried, loop: _Loop) -> int | _Carried | None:
    whole = next(iter(operand_names(loop.instruction)), None)
    return _read_value(_name_of_element(whole, carried, loop.outside), loop.outside)


def _name_of_element(name: str | None, carried: _Carried, scope: Scope) -> str | None:
    whole = _find_origin(name, scope)
    if whole is None or whole.opcode != "tuple":
        return None
    names = operand_names(whole)
    return names[carried.index] if carried.index < len(names) else None
