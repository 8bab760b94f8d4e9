"""The arrays that a collective sends, each with its own witnesses where the compiler merged them.

A combined collective has a tuple for a result, and the get-tuple-elements keep the metadata of
the ones that it was made of. On GPU the combined arrays become one flat one: a concatenation
before, slices after.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from txcore._compat import TAG_KEY
from txcore.profiling.hlo import attributes
from txcore.profiling.hlo.graph import Graph, Scope, operand_name, operand_names
from txcore.profiling.hlo.text import Instruction
from txcore.profiling.hlo.types import HloError, Shape, parse_shapes

MARK = "is_spmd_generated"
_VIEWS = frozenset({"bitcast", "copy", "reshape", "convert"})  # they keep the elements' order
_NOT_ONCE = frozenset({"while", "conditional"})
_IS_FLAT = re.compile(r"\w+\[\d+\]")
_SLICE = re.compile(r"\bslice=\{\[(\d+):(\d+)\]\}")
_NUMBER = re.compile(r"\((\d+)\)")
_INDEX = re.compile(r"\bindex=(\d+)")
_FARTHEST = 32  # steps to follow; a damaged text may lead in a circle


@dataclass(frozen=True, slots=True)
class Input:
    """One array that each device puts into a collective.

    tag, op_name, marked: what the compiler left of where it comes from; empty where nothing.
      Of a collective with one array they are those of its own line, with several tags joined by
      commas where several arrays were merged into one.
    pieces: what a flat array was concatenated from, in order; the program may have done it itself.
    """

    shape: Shape
    tag: str = ""
    op_name: str = ""
    marked: bool = False
    pieces: tuple["Input", ...] = ()


@dataclass(frozen=True, slots=True)
class _Value:
    """What an instruction computes, seen from within its computation."""

    scope: Scope
    instruction: Instruction


def inputs_of(
    instruction: Instruction, operands: Sequence[str], computation: str, graph: Graph
) -> tuple[Input, ...]:
    """Return the arrays that a collective sends.

    Args:
      instruction: the collective.
      operands: as printed, those that are sent only.
      computation: the name of the computation that it is in.
      graph: of its module.

    Raises:
      HloError: there are no operands, or one is not defined or has no array type.
    """
    here = _Value(graph.scope(computation), instruction)
    shapes = [_shapes(text, here.scope) for text in operands]
    flat = tuple(shape for of_one in shapes for shape in of_one)
    if not flat:
        raise HloError("no operands")
    if len(flat) == 1:
        alone = _said_by(instruction, flat[0])
        return (replace(alone, pieces=_pieces(here, operand_name(operands[0]), graph)),)
    if instruction.opcode.startswith("all-to-all"):
        # One array in as many parts as there are devices; XLA combines no all-to-alls.
        return tuple(_said_by(instruction, shape) for shape in flat)
    result = _result(here, graph)
    elements = result.scope.elements.get(result.instruction.name, {})
    # Only an element's own words are taken: the tags that the combiner joins on the op's line
    # leave out arrays without a tag, so that their order tells nothing of which array had which.
    return tuple(_said_by(elements.get(i), shape) for i, shape in enumerate(flat))


def _shapes(operand: str, scope: Scope) -> tuple[Shape, ...]:
    if "[" in operand:  # older XLA prints each operand's type before its name
        return parse_shapes(operand)
    if (found := scope.by_name.get(operand.removeprefix("%"))) is None:
        raise HloError(f"operand {operand[:40]!r} is not defined")
    return parse_shapes(found.type)


def _said_by(instruction: Instruction | None, shape: Shape) -> Input:
    if instruction is None:
        return Input(shape)
    says = attributes.frontend_attributes(instruction.rest)
    name = attributes.op_name(instruction.rest)
    return Input(shape, says.get(TAG_KEY, ""), name, says.get(MARK) == "true")


def _result(value: _Value, graph: Graph) -> _Value:
    """Return where the result of a collective is read: after its -done, outside of its wrapper."""
    for _ in range(_FARTHEST):
        if done := value.scope.dones.get(value.instruction.name):
            value = _Value(value.scope, done)
        elif (
            value.scope.root is value.instruction
            and (call := graph.only_caller(value.scope.computation.name))
            and call.instruction.opcode not in _NOT_ONCE
        ):
            value = _Value(graph.scope(call.caller), call.instruction)
        else:
            break
    return value


def _pieces(collective: _Value, operand: str, graph: Graph) -> tuple[Input, ...]:
    joined = _concatenation(collective.scope, operand, graph)
    if joined is None:
        return ()
    try:
        operands, _ = attributes.split(joined.instruction)
        parts = attributes.split_outside(operands, ",")
        shapes = [shape for part in parts for shape in _shapes(part, joined.scope)]
    except HloError:
        return ()
    said = _said_of_ranges(_result(collective, graph), graph)
    ends = list(itertools.accumulate(shape.elements for shape in shapes))
    return tuple(
        replace(said.get((end - shape.elements, end), Input(shape)), shape=shape)
        for shape, end in zip(shapes, ends, strict=True)
    )


def _concatenation(scope: Scope, name: str, graph: Graph) -> _Value | None:
    """Follow an operand back to the flat concatenation that made it, or return None."""
    element = 0  # which one of a tuple is followed
    for _ in range(_FARTHEST):
        maker = scope.by_name.get(name)
        if maker is None:
            return None
        if maker.opcode == "concatenate":
            return _Value(scope, maker) if _IS_FLAT.match(maker.type) else None
        names = operand_names(maker)
        if maker.opcode in ("fusion", "call"):
            called = [c for c in attributes.callees(maker) if c in graph.module.computations]
            inner = graph.scope(called[0]).root if called else None
            if inner is None:
                return None
            scope, name = graph.scope(called[0]), inner.name
        elif maker.opcode == "parameter":
            call = graph.only_caller(scope.computation.name)
            number = _NUMBER.match(maker.rest)
            if call is None or number is None or call.instruction.opcode in _NOT_ONCE:
                return None
            arguments = operand_names(call.instruction)
            if int(number[1]) >= len(arguments):
                return None
            scope, name = graph.scope(call.caller), arguments[int(number[1])]
        elif maker.opcode == "get-tuple-element" and names:
            index = _INDEX.search(maker.rest)
            name, element = names[0], int(index[1]) if index else 0
        elif maker.opcode == "tuple" and element < len(names):
            name = names[element]
        elif maker.opcode in _VIEWS and names:
            name = names[0]
        else:
            return None
    return None


def _said_of_ranges(result: _Value, graph: Graph) -> dict[tuple[int, int], Input]:
    """Return what the slices of a flat array say of themselves, by the elements they read."""
    said: dict[tuple[int, int], Input] = {}
    for value in _uses(result, graph):
        if value.instruction.opcode == "slice" and (found := _SLICE.search(value.instruction.rest)):
            elements = int(found[1]), int(found[2])
            if elements not in said or not said[elements].op_name:
                said[elements] = _first_words(value, graph)
    return said


def _uses(value: _Value, graph: Graph) -> Iterator[_Value]:
    """Yield what uses a value, inside of fusions too, and seen through what only renames it."""
    reached, seen = [value], set()
    while reached:
        value = reached.pop()
        for user in value.scope.users.get(value.instruction.name, ()):
            for use in _entered(value, user, graph):
                key = (use.scope.computation.name, use.instruction.name)
                if key not in seen:
                    seen.add(key)
                    yield use
                    if use.instruction.opcode in (*_VIEWS, "parameter"):
                        reached.append(use)


def _entered(value: _Value, user: Instruction, graph: Graph) -> list[_Value]:
    """Return a user, or in its place the parameters of the fusion that it is."""
    called = [c for c in attributes.callees(user) if c in graph.module.computations]
    if user.opcode not in ("fusion", "call") or not called:
        return [_Value(value.scope, user)]
    inner = graph.scope(called[0])
    places = [i for i, n in enumerate(operand_names(user)) if n == value.instruction.name]
    return [_Value(inner, inner.parameters[i]) for i in places if i in inner.parameters]


def _first_words(value: _Value, graph: Graph) -> Input:
    """Return what the first instruction says that has words, from a slice on through its views."""
    nothing = Input(Shape("", (), 0))
    for _ in range(_FARTHEST):
        said = _said_by(value.instruction, nothing.shape)
        if said.op_name or said.tag:
            return said
        users = value.scope.users.get(value.instruction.name, [])
        outer = _result(value, graph)
        if outer != value:
            value = outer
        elif len(users) == 1 and users[0].opcode in _VIEWS:
            value = _Value(value.scope, users[0])
        else:
            break
    return nothing
