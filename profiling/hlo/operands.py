"""The arrays that a collective sends, each with its own witnesses where the compiler merged them.

A combined collective has a tuple for a result, and the get-tuple-elements keep the metadata of
the ones that it was made of. On GPU the combined arrays become one flat one: a concatenation
before, slices after.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from txcore.profiling.hlo import attributes
from txcore.profiling.hlo.dataflow import (
    find_concatenation,
    find_uses,
    find_views,
    follow_to_result,
)
from txcore.profiling.hlo.graph import Graph, Scope, Value, operand_names
from txcore.profiling.hlo.text import Instruction, operand_name
from txcore.profiling.hlo.tpu_async import last_step
from txcore.profiling.hlo.types import HloError, Shape, parse_shapes, to_int
from txcore.tags import TAG_KEY, tags_in

_MARK = "is_spmd_generated"
_PRIMITIVES = re.compile(
    r"(?<![\w.\-])[\w.\-]++(?=:|\)*+$)"
)  # "jit(f)/(dot_general:shard_map/psum)" has two
_OF_A_COLLECTIVE = re.compile(
    r"(?:unreduced_)?"
    r"(?:psum|pmax|pmin|all_gather|reduce_scatter|all_to_all|ppermute|pbroadcast)(?:_\w+|2)?$"
)
_SLICE = re.compile(r"\{\[(\d+):(\d+)\]\}")
MOST_ARRAYS = 1 << 17  # of one collective; real ones have some thousand


@dataclass(frozen=True, slots=True)
class Words:
    """What the compiler kept of an op's origin; `tag` as printed, several joined by commas."""

    tag: str = ""
    op_name: str = ""
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Input:
    """One array that each device puts into a collective.

    Attributes:
      shape: its type.
      tag, op_name, marked: what the compiler kept of its origin. The one array of a collective has
        the collective's own; several tags are joined by commas where arrays were merged into one.
      pieces: the arrays that a flat array was concatenated from, in order; the program itself may
        have concatenated them.
    """

    shape: Shape
    tag: str = ""
    op_name: str = ""
    marked: bool = False
    pieces: tuple["Input", ...] = ()


def find_witnesses(collective: Value, graph: Graph) -> list[Instruction]:
    """Return the instructions that may tell a collective's origin: its own line first."""
    found = follow_to_result(collective, graph)
    if last := last_step(collective.instruction, graph):
        found.append(last)
    return [value.instruction for value in found]


def words_of(instructions: Iterable[Instruction]) -> Words:
    """Join what instructions say of one value: the first tag and op_name, and any mark."""
    tag, op_name, marked = "", "", False
    for instruction in instructions:
        says = instruction.frontend
        name = attributes.op_name(instruction)
        named = says.get(TAG_KEY) or ",".join(tags_in(name))
        tag, op_name = tag or named, op_name or name
        marked = marked or says.get(_MARK) == "true"
    return Words(tag, op_name, marked)


def inputs_of(
    collective: Value, operands: Sequence[str], words: Words, graph: Graph
) -> tuple[Input, ...]:
    """Return the arrays that a collective sends.

    Args:
      collective: where it stands.
      operands: as printed, those that are sent only.
      words: the collective's own.
      graph: its module.

    Raises:
      HloError: there are no operands, or one is not defined or has no array type.
    """
    shapes = _shapes_of_operands(operands, collective.scope, graph)
    if not shapes:
        raise HloError("no operands")
    # An all-to-all of several is one array, cut into a part for each device.
    if len(shapes) == 1 or collective.instruction.opcode.startswith("all-to-all"):
        alone = [_input_with_words(words, shape) for shape in shapes]
        if len(shapes) == 1:
            alone = [replace(alone[0], pieces=_find_pieces(collective, operands[0], words, graph))]
        return tuple(alone)
    # The tags on a combined op's own line are no list of its arrays: one without a tag is left
    # out, and on GPU their order is another. So each array has the words of its own element.
    result = follow_to_result(collective, graph)[-1]
    elements = result.scope.elements.get(result.instruction.name, {})
    parts = [elements.get(i) for i in range(len(shapes))]
    whole = _Whole.take_apart(words)
    said = [_words_after(Value(result.scope, e), whole, graph) if e else Words() for e in parts]
    return tuple(map(_input_with_words, _with_the_last_tag(said, words.tag.split(",")), shapes))


def _shapes_of_operands(operands: Sequence[str], scope: Scope, graph: Graph) -> list[Shape]:
    shapes: list[Shape] = []
    for operand in operands:
        found = _shapes_of_operand(operand, scope)
        # A tuple may be named by any number of collectives, and any number of times by each.
        if len(found) > 1 and not graph.allows_steps(len(found)):
            raise HloError("it sends more arrays of tuples than are looked at")
        shapes += found
        if len(shapes) > MOST_ARRAYS:
            raise HloError(f"it sends more than {MOST_ARRAYS:,} arrays")
    return shapes


@dataclass(frozen=True)
class _Whole:
    """The words of a collective's own line, parsed once for all of its arrays."""

    tags: frozenset[str]
    primitives: frozenset[str] | None

    @classmethod
    def take_apart(cls, words: Words) -> "_Whole":
        tags = frozenset(words.tag.split(",") if words.tag else ())
        primitives = frozenset(_PRIMITIVES.findall(words.op_name)) if words.op_name else None
        return cls(tags, primitives)


def _with_the_last_tag(said: list[Words], tags: list[str]) -> list[Words]:
    """Give the only array without words the only tag that no other array has."""
    silent = [i for i, words in enumerate(said) if words == Words()]
    left = set(tags) - {words.tag for words in said}
    if len(tags) != len(said) or len(silent) != 1 or len(left) != 1:
        return said
    return [Words(tag=left.pop()) if i == silent[0] else words for i, words in enumerate(said)]


def _input_with_words(words: Words, shape: Shape) -> Input:
    return Input(shape, words.tag, words.op_name, words.marked)


def _shapes_of_operand(operand: str, scope: Scope) -> tuple[Shape, ...]:
    if "[" in operand:  # older XLA prints each operand's type before its name
        return parse_shapes(operand)
    if (found := scope.by_name.get(operand.removeprefix("%"))) is None:
        raise HloError(f"operand {operand[:40]!r} is not defined")
    return scope.shapes_of(found)


def _words_after(value: Value, whole: _Whole, graph: Graph) -> Words:
    """Return the words of a part of a collective's result, or of its first view that has any."""
    for view in find_views(value, graph):
        words = words_of([view.instruction])
        if (words.tag or words.op_name) and (view == value or _are_of(whole, words)):
            return words
    return Words()


def _are_of(whole: _Whole, words: Words) -> bool:
    """Tell whether a view's words are the collective's, not those of the program's next step."""
    if words.tag and whole.tags and words.tag not in whole.tags:
        return False
    primitive = words.op_name.rsplit("/", 1)[-1]
    if whole.primitives is None:
        return bool(_OF_A_COLLECTIVE.match(primitive))
    return primitive in whole.primitives


def _find_pieces(collective: Value, operand: str, words: Words, graph: Graph) -> tuple[Input, ...]:
    maker = collective.scope.by_name.get(operand_name(operand))
    joined = find_concatenation(Value(collective.scope, maker), graph) if maker else None
    if joined is None or not graph.allows_steps(len(operand_names(joined.instruction))):
        return ()
    try:
        shapes = _shapes_of_operands(joined.instruction.operands, joined.scope, graph)
    except HloError:
        return ()
    said = _words_of_ranges(collective, words, graph)
    ends = list(itertools.accumulate(shape.elements for shape in shapes))
    return tuple(
        _input_with_words(said.get((end - shape.elements, end), Words()), shape)
        for shape, end in zip(shapes, ends, strict=True)
    )


def _words_of_ranges(collective: Value, words: Words, graph: Graph) -> dict[tuple[int, int], Words]:
    """Return the words of the slices of a collective's flat result, by the elements they read."""
    said: dict[tuple[int, int], Words] = {}
    whole = _Whole.take_apart(words)
    for use in find_uses(follow_to_result(collective, graph)[-1], graph):
        is_slice = use.instruction.opcode == "slice"
        printed = use.instruction.attributes.get("slice", "") if is_slice else ""
        if found := _SLICE.match(printed):
            elements = to_int(found[1]), to_int(found[2])
            if said.get(elements, Words()) == Words():
                said[elements] = _words_after(use, whole, graph)
    return said
