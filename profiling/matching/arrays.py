"""Describe the arrays of compiled collectives, which are matched with the declared ones."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from txcore.profiling.declared import source
from txcore.profiling.declared.collectives import Declared
from txcore.profiling.hlo import Input, Op, Shape
from txcore.profiling.hlo.trip_counts import ONCE, Trips
from txcore.profiling.matching.origin import UNEXPLAINED, is_inserted, origin_of

_MOST_NAMED = 64
_NOTHING = Shape("", (0,), 0)


@dataclass(frozen=True)
class Unit:
    """One array of a compiled collective.

    Attributes:
      op: its op's place in the list of ops.
      kind: HLO's name of the collective.
      shape: of the array as sent.
      elements: S as in nccl-tests (times n for an all-gather).
      trips: how often its op runs in one call of the program.
      claims: the tags that it may have, None for no tag. A merged array without words of its own
        may have any tag of its op.
      tag: those tags, joined by commas.
      op_name: its path of scopes.
      source, wanted_source: "file.py:12" of itself, and of its consumer.
      place, wanted_place: the same with the files' whole paths.
      origin, note: its origin by its line, and what the line leaves open.
      has_own_line: whether the line describes this array alone, not all that its op merged.
      doubtful: whether its op contains an array of the partitioner's, and nothing tells which.
      pieces: the arrays that it was concatenated from, perhaps by the program itself.
      target: the function that a custom call runs.
      laid: the array as it lies on a device where it is sent, before what the compiler did to its
        dims; dim: which of them a gather or reduce-scatter is along, -1 of others.
      added: "file.py:12" of an undeclared array that was merged into this one, else "".
    """

    op: int
    kind: str
    shape: Shape
    elements: int
    trips: Trips = ONCE
    claims: tuple[str | None, ...] = (None,)
    tag: str = ""
    op_name: str = ""
    source: str = ""
    wanted_source: str = ""
    place: str = ""
    wanted_place: str = ""
    origin: str = "unknown"
    note: str = ""
    has_own_line: bool = True
    doubtful: bool = False
    pieces: tuple["Unit", ...] = ()
    laid: Shape = _NOTHING
    dim: int = -1
    added: str = ""
    target: str = ""

    @property
    def size(self) -> int:
        """Return its count of real numbers: a compiler may send the parts of complex ones apart."""
        return count_reals(self.elements, self.shape.dtype)


def count_reals(elements: int, dtype: str) -> int:
    """Return how many real numbers an array of a dtype holds."""
    return elements * (2 if dtype.startswith("complex") else 1)


def size_of(declared: Declared) -> int:
    """Return the real numbers that a declared collective sends, as `Unit.size`."""
    return count_reals(declared.elements, declared.dtype)


def units_of(ops: Sequence[Op]) -> Iterator[Unit]:
    """Yield the arrays of compiled collectives, in order; an op without any has an empty one."""
    for place, op in enumerate(ops):
        like: dict[Hashable, Unit] = {}  # one unit for all arrays with the same words
        for one in _inputs_as_sent(op):
            yield _make_unit(place, op, one, like)


def _inputs_as_sent(op: Op) -> tuple[Input, ...]:
    if op.kind == "all-to-all" and len(op.inputs) == op.group_size > 1:
        # One array, printed as the parts that go to each device.
        first = op.inputs[0]
        whole = replace(first.shape, dims=(len(op.inputs), *first.shape.dims))
        return (replace(first, shape=whole),)
    return op.inputs or (Input(_NOTHING),)


def _make_unit(
    place: int, op: Op, one: Input, like: dict[Hashable, Unit], *, is_piece: bool = False
) -> Unit:
    says = one.tag, one.op_name, one.marked, bool(one.pieces), is_piece
    if (same := like.get(says)) is None:
        same = like[says] = _describe_unit(place, op, one, is_piece=is_piece)
    if one.shape == same.shape and not one.pieces:
        return same
    return replace(
        same,
        shape=one.shape,
        laid=one.shape,
        elements=_count_elements(op, one),
        pieces=tuple(_make_unit(place, op, piece, like, is_piece=True) for piece in one.pieces),
    )


def _describe_unit(place: int, op: Op, one: Input, *, is_piece: bool) -> Unit:
    """Return the unit of an array without its pieces."""
    # Of a merged array that says nothing itself, the op's line tells what it may be.
    is_merged = is_piece or len(op.inputs) > 1
    has_own = bool(one.tag or one.op_name or one.marked)
    tags = tuple(t for t in one.tag.split(",") if t) if has_own else op.tags
    op_name = one.op_name or op.op_name
    line = op
    if has_own:
        line = replace(op, tags=tags, op_name=op_name, marked=one.marked)
    origin, note = origin_of(line)
    doubtful = origin in UNEXPLAINED and (bool(one.pieces) or (is_merged and not has_own))
    may_be_untagged = not tags or len(tags) > 1 or (is_merged and not has_own)
    own, wanted = _find_frame(line, origin), source.user_frame(op.wanted_frames)
    return Unit(
        op=place,
        kind=op.kind,
        shape=one.shape,
        elements=_count_elements(op, one),
        trips=op.trips,
        claims=(*tags, None) if may_be_untagged else tags,
        tag=_join_tags(tags),
        op_name=op_name,
        source=source.short_line(own),
        wanted_source=source.short_line(wanted),
        place=source.whole_line(own),
        wanted_place=source.whole_line(wanted),
        origin=origin,
        note=note,
        has_own_line=has_own or not is_merged,
        doubtful=doubtful,
        laid=one.shape,
        dim=op.dim,
        target=op.target,
    )


def _count_elements(op: Op, one: Input) -> int:
    return (op.group_size if op.kind == "all-gather" else 1) * one.shape.elements


def _join_tags(tags: Sequence[str]) -> str:
    """Join the tags that an array may have; short, since many thousand arrays hold it."""
    named = list(dict.fromkeys(tags))
    more = len(named) - _MOST_NAMED
    return ",".join(named[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _find_frame(op: Op, origin: str) -> source.Frame | None:
    """Return the user's line of an op, or of its consumer where it was inserted."""
    own, wanted = source.user_frame(op.frames), source.user_frame(op.wanted_frames)
    if origin == "reshard" and not op.op_name.endswith("/reshard"):
        return wanted
    # Named after the shard_map where it is needed: by a compiler that does not mark it, or where
    # the shard_map leaves axes to the partitioner.
    at_its_use = not op.marked or origin == "partitioner"
    is_named = op.op_name.endswith("/shard_map") and at_its_use and own
    return own if is_named or not is_inserted(op) else wanted or own
