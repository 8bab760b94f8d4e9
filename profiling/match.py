"""Compare the collectives of a compiled program with those that the traced one declares.

Per kind and groups of devices the elements sent in one call (S times trips) are compared:
elements and not bytes, since compilers promote dtypes. More than declared: the surplus has no
match, whatever its tag says. Less: a declared operand without a compiled one of its size is
missing; where the compiler merged equal ones, dropped dead ones or moved them out of a loop,
a twin of its size is left and nothing is missing.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from txcore.profiling.hlo import Op
from txcore.profiling.jaxpr import Declared
from txcore.profiling.origin import UNEXPLAINED

Key = tuple[object, ...]


@dataclass(frozen=True)
class Matched:
    """`surplus`: places of the ops that no declaration explains; `missing`: declared, not there."""

    surplus: frozenset[int]
    missing: tuple[Declared, ...]


def match(
    ops: Sequence[Op],
    origins: Sequence[str],
    declared: Sequence[Declared],
    live: Sequence[Declared],
) -> Matched:
    """Match compiled collectives with declared ones.

    Args:
      ops: the compiled program's, as `find_collectives` returns them.
      origins: the origin of each by its own line, as `origin_of` returns it.
      declared: all that the traced program declares.
      live: those of them whose result is used; only they can be missing.

    Returns:
      What has no match on either side.
    """
    wanted, needed = by_key(declared), by_key(live)
    compiled: dict[Key, list[int]] = defaultdict(list)
    for place, op in enumerate(ops):
        if op.kind not in ("unknown", "custom-call"):
            compiled[key_of(op)].append(place)
    surplus: set[int] = set()
    for key, places in compiled.items():
        credible = [p for p in places if origins[p] not in UNEXPLAINED and origins[p] != "reshard"]
        surplus |= _surplus(credible, ops, wanted.get(key, []))
    missing: list[Declared] = []
    for key, wanted_here in needed.items():
        missing += _missing([ops[p] for p in compiled.get(key, [])], wanted_here)
    return Matched(frozenset(surplus), tuple(missing))


def key_of(op: Op | Declared) -> Key:
    """Return what a compiled and a declared collective must have in common: kind and devices."""
    return op.kind, op.groups, op.pairs


def by_key(declared: Iterable[Declared]) -> dict[Key, list[Declared]]:
    """Group declared collectives by `key_of`."""
    found: dict[Key, list[Declared]] = defaultdict(list)
    for d in declared:
        found[key_of(d)].append(d)
    return found


def _sent(ops: Sequence[Op], declared: Sequence[Declared]) -> tuple[int, int]:
    """Return the elements sent by both; of one execution each where a loop's trips are unknown."""
    known = all(op.trips.known for op in ops) and all(d.trips_known for d in declared)
    return (
        sum(op.elements * (op.trips.count if known else 1) for op in ops),
        sum(d.elements * (d.trips if known else 1) for d in declared),
    )


def _excess(ops: Sequence[Op], declared: Sequence[Declared]) -> int:
    compiled, wanted = _sent(ops, declared)
    return compiled - wanted


def _surplus(places: list[int], ops: Sequence[Op], declared: Sequence[Declared]) -> set[int]:
    """Pick the ops to blame for a surplus: least credible first, all of the same credibility."""
    blamed: set[int] = set()
    if _excess([ops[p] for p in places], declared) <= 0:
        return blamed
    for suspects in _least_credible_first(places, ops, declared):
        suspects = suspects - blamed
        excess = _excess([ops[p] for p in places if p not in blamed], declared)
        if excess <= 0:
            break
        exact = [p for p in suspects if _sent([ops[p]], declared)[0] == excess]
        # Of two that look alike nobody can tell which one was added: blame both.
        blamed |= {exact[0]} if len(exact) == 1 else suspects
    return blamed


def _least_credible_first(
    places: list[int], ops: Sequence[Op], declared: Sequence[Declared]
) -> Iterator[set[int]]:
    """Yield ops by credibility: tags nobody declared, tags with more than declared, the rest."""
    by_tags: dict[frozenset[str | None], list[int]] = defaultdict(list)
    for p in places:
        by_tags[frozenset(ops[p].tags or (None,))].append(p)
    declared_tags = {d.tag for d in declared}
    yield {p for tags, same in by_tags.items() if not tags <= declared_tags for p in same}
    for tags, same in by_tags.items():
        if _excess([ops[p] for p in same], [d for d in declared if d.tag in tags]) > 0:
            yield set(same)
    yield set(by_tags.get(frozenset({None}), ()))
    yield set(places)


def _missing(ops: Sequence[Op], declared: Sequence[Declared]) -> list[Declared]:
    """Return the declared operands that are absent, of one key."""
    if _excess(ops, declared) >= 0:
        return []  # merged, split or combined: all the elements are there
    sizes = {
        shape.elements * (op.group_size if op.kind == "all-gather" else 1)
        for op in ops
        for shape in op.operands
    }
    tags = [d.tag for d in declared]
    tags_there = {tag for op in ops for tag in op.tags}

    def is_there(d: Declared) -> bool:
        if d.elements in sizes or (ops and not d.size_known):
            return True
        return d.tag in tags_there and tags.count(d.tag) == 1  # the compiler sends less of it

    return [d for d in declared if not d.foldable and not is_there(d)]
