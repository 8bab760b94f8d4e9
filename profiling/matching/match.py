"""Match the collectives of a compiled program one to one with those that the traced one declares.

Both sides are broken down into single arrays: a `Unit` is one of a compiled op, a `Declared` one
of a traced equation. Each is used once. The two of a pair agree in devices, kind, tag and number of
elements (not bytes: compilers promote dtypes). `rules.py` tries the plain forms before the rare:

1. kept as declared, or merged with others into one op (its arrays are told apart)
2. joined with others into one flat array, or cut into several
3. moved out of a loop (fewer trips), or its loop unrolled (several, with the same trips together)
4. sharded further by the partitioner, in a shard_map that leaves axes to it
5. rewritten as another kind that does the same
6. without its tag, where the compiler marks what it adds itself and did not mark this
7. under a tag that this trace does not have: jax's cache on disk ignores names

A Pallas kernel that sends by remote DMA is one custom call, whose line has no sizes: it is matched
by its tag, its name, its line in the source and its trips; those that nothing uses come last.

A unit without a match is unexplained, whatever its tag says. A declaration without a match is
missing, unless nothing uses it, an equal one does its work, or it has no work.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp

from txcore.profiling.declared.collectives import (
    CHOSEN_LATER,
    RESHARD,
    RESHARD_OF_A_SUM,
    RULE,
    Declared,
)
from txcore.profiling.declared.equations import made_by_autodiff
from txcore.profiling.declared.remote_dma import REMOTE_DMA
from txcore.profiling.hlo import Op, Shape
from txcore.profiling.hlo.custom_calls import is_kernel
from txcore.profiling.matching import rules
from txcore.profiling.matching.arrays import Unit, size_of, units_of
from txcore.profiling.matching.fates import fates_of
from txcore.profiling.matching.origin import UNEXPLAINED

_MATCHED = ("txcore", "user", "autodiff")
_SUMS = ("all-reduce", "reduce-scatter")
_MOVES = ("all-gather", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Matched:
    """The result of a match.

    Attributes:
      units: the arrays of the compiled ops.
      links: for each unit, the places of the declarations that it carries out.
      fates: for each declaration, in order, what became of it; see `txcore.profiling.Fate`.
    """

    units: tuple[Unit, ...]
    links: tuple[tuple[int, ...], ...]
    fates: tuple[tuple[str, ...], ...]


def match_collectives(ops: Sequence[Op], declared: Sequence[Declared], *, marks: bool) -> Matched:
    """Match compiled collectives with declared ones.

    Args:
      ops: the compiled program's, as `find_collectives` returns them.
      declared: what the traced program declares, as `list_declared` returns it.
      marks: whether this compiler marks the collectives that it adds itself.

    Returns:
      The arrays of the compiled ops, what each carries out, and what became of the declared ones.
    """
    work = _Match(ops, declared)
    certain, doubtful = _split_by_credibility(declared, work.devices)
    # Dead and duplicate collectives are usually eliminated, so they are matched last. A partitioner
    # that does not mark its work, in a shard_map that leaves axes to it, gives what it adds the
    # names of such collectives: there they are not matched at all.
    has_copies = not marks and not all(declared[i].size_known for i in (*certain, *doubtful))
    work.match_declared(certain, marks=marks)
    if not has_copies:
        work.match_declared(doubtful, marks=marks)
    work.match_kernels()
    work.explain_reshards()
    if marks:
        work.explain_rules()
    work.settle_loops()
    work.settle_doubts()
    places = sorted(work.units, key=lambda i: work.units[i].op)
    links = tuple(tuple(work.links.get(i, ())) for i in places)
    units = tuple(work.units[i] for i in places)
    return Matched(units, links, fates_of(declared, work.devices, units, links))


class _Match:
    """A match in progress: the open units and declarations, and the links so far."""

    def __init__(self, ops: Sequence[Op], declared: Sequence[Declared]):
        self.ops, self.declared = ops, declared
        self.units = dict(enumerate(units_of(ops)))
        self.links: dict[int, list[int]] = {}  # of a unit, the declarations
        self.left = [d.trips for d in declared]  # executions that no unit carries out yet
        numbers: dict[Hashable, int] = {}
        self.op_devices = [_number_devices(numbers, op) for op in ops]
        self.devices = [_number_devices(numbers, d) for d in declared]
        self.order: Sequence[int] = ()  # the declarations to consider, the first ones first

    def match_declared(self, order: Sequence[int], *, marks: bool) -> None:
        """Match these declarations, the first ones first, from the plain rules to the rare."""
        self.order = order
        for rule in rules.PLAIN:
            self.join_by_rule(rule)
        self.take_apart()
        self.match_sums()
        for rule in (rules.LOOPS, rules.SHARDED, rules.REWRITE, rules.PADDED):
            self.join_by_rule(rule)
        if marks:
            self.join_by_rule(rules.UNTAGGED)
        self.join_by_rule(rules.RENAMED, self.units_under_other_names())

    def open_units(self, origins: Sequence[str] = _MATCHED) -> list[int]:
        """Return the units of these origins that nothing explains yet."""
        may_match = (i for i, u in self.units.items() if u.doubtful or u.origin in origins)
        return [i for i in may_match if i not in self.links]

    def open_declared(self) -> list[int]:
        """Return the declarations that are not wholly carried out, in order."""
        return [i for i in self.order if self.left[i] > 0]

    def link_unit(self, unit: int, declared: Iterable[int]) -> None:
        """Note that a unit carries out these declarations, as often as it runs."""
        self.links[unit] = list(declared)
        trips = self.units[unit].trips
        for i in self.links[unit]:
            known = trips.known and self.declared[i].trips_known
            self.left[i] -= trips.count if known else self.left[i]

    def units_under_other_names(self) -> list[int]:
        """Return the open units all of whose tags this trace does not have."""
        known = {d.tag for d in self.declared}
        tags = {i: [t for t in self.units[i].claims if t] for i in self.open_units()}
        return [i for i, of in tags.items() if of and not known.intersection(of)]

    def join_by_rule(self, rule: rules.Rule, units: Sequence[int] | None = None) -> None:
        """Match one to one by a rule, among all open units or the given ones."""
        waiting: dict[Hashable, list[int]] = defaultdict(list)
        for i in reversed(self.open_declared()):
            waiting[self.devices[i], rule.of_declared(self.declared[i])].append(i)
        refused: set[Hashable] = set()  # of many units that fit nothing, only the first is tried
        for unit in self.open_units() if units is None else units:
            u = self.units[unit]
            for tag in u.claims:
                key = self.op_devices[u.op], rule.of_unit(u, tag)
                if (*key, u.size, u.trips) in refused:
                    continue
                found = waiting.get(key, [])
                if (chosen := self._first_fitting(found, u, rule)) is not None:
                    self.link_unit(unit, [chosen])
                    break
                refused.add((*key, u.size, u.trips))

    def _first_fitting(self, waiting: list[int], unit: Unit, rule: rules.Rule) -> int | None:
        while waiting and self.left[waiting[-1]] <= 0:
            waiting.pop()
        still = (i for i in reversed(waiting) if self.left[i] > 0)
        return next((i for i in still if rule.fits(unit, self.declared[i])), None)

    def take_apart(self) -> None:
        """Replace an undeclared flat array by its pieces, where one of them is declared."""
        flat = {i: self.units[i] for i in self.open_units() if self.units[i].pieces}
        pieces: dict[int, range] = {}
        for i, unit in flat.items():
            del self.units[i]
            start = max(self.units, default=-1) + 1
            pieces[i] = range(max(start, i + 1), max(start, i + 1) + len(unit.pieces))
            self.units |= dict(zip(pieces[i], unit.pieces, strict=True))
        for rule in (*rules.PLAIN, rules.LOOPS):
            self.join_by_rule(rule)
        for i, unit in flat.items():
            if not any(piece in self.links for piece in pieces[i]):
                for piece in pieces[i]:
                    del self.units[piece]
                self.units[i] = unit

    def match_sums(self) -> None:
        """Match by sums: arrays that were joined into a flat one, and one that was cut up."""
        units, declared = self._group_alike()
        for key, places in units.items():
            by_tag = self._group_by_tag(declared.get(key, ()))
            sums = {t: sum(size_of(self.declared[i]) for i in of) for t, of in by_tag.items()}
            for unit in places:
                claims = [tag for tag in self.units[unit].claims if tag in by_tag]
                if claims and sum(sums[t] for t in claims) == self.units[unit].size:
                    self.link_unit(unit, [i for t in claims for i in by_tag.pop(t)])
        for key, wanted in declared.items():
            for tag, whole in self._group_by_tag(i for i in wanted if self.left[i] > 0).items():
                parts = [i for i in units.get(key, ()) if self.units[i].claims == (tag,)]
                parts = [i for i in parts if i not in self.links]
                sent = sum(self.units[i].size for i in parts)
                if parts and sent == sum(size_of(self.declared[i]) for i in whole):
                    for part in parts:
                        self.link_unit(part, whole)

    def _group_by_tag(self, places: Iterable[int]) -> dict[str | None, list[int]]:
        found: dict[str | None, list[int]] = defaultdict(list)
        for i in places:
            found[self.declared[i].tag].append(i)
        return found

    def _group_alike(self) -> tuple[dict[Hashable, list[int]], dict[Hashable, list[int]]]:
        """Group what is open by kind, devices and trips."""
        units: dict[Hashable, list[int]] = defaultdict(list)
        declared: dict[Hashable, list[int]] = defaultdict(list)
        for i in self.open_units():
            u = self.units[i]
            units[u.kind, self.op_devices[u.op], u.trips.count].append(i)
        for i in self.open_declared():
            d = self.declared[i]
            declared[d.kind, self.devices[i], d.trips].append(i)
        return units, declared

    def match_kernels(self) -> None:
        """Match custom calls that send with the Pallas kernels that the program declares to send.

        The call's line has the kernel's name and tag, and no sizes: those are the declaration's.
        """
        kernels = [i for i, d in enumerate(self.declared) if d.kind == REMOTE_DMA]
        waiting = self.open_units(("opaque",))
        calls = [i for i in waiting if is_kernel(self.units[i].target)]
        for live in (True, False):
            self.order = [i for i in kernels if self.declared[i].live is live]
            for rule in rules.KERNELS:
                self.join_by_rule(rule, [i for i in calls if i not in self.links])
        for i in calls:
            if i in self.links:
                (place,) = self.links[i]
                self.units[i] = _with_sizes(self.units[i], self.declared[place])

    def explain_reshards(self) -> None:
        """Explain collectives at an explicit reshard's line; the compiler chooses their kind."""
        live = [i for i, d in enumerate(self.declared) if d.primitive == RESHARD and d.live]
        by_name = {self.declared[i].source: i for i in live if not self.declared[i].asked_by}
        by_result = {
            (self.declared[i].source, self.declared[i].asked_by): i
            for i in live
            if self.declared[i].kind == RESHARD
        }
        for unit in (*self.open_units((RESHARD,)), *self.open_units(UNEXPLAINED)):
            u = self.units[unit]
            place = by_name.get(u.source) if u.origin == RESHARD else None
            if place is None and not made_by_autodiff(u.op_name):
                place = by_result.get((u.source, u.op_name.rpartition("/")[2]))
            if place is None:
                continue
            d = self.declared[place]
            can_be = u.kind in _MOVES or d.kind == RESHARD_OF_A_SUM
            if can_be and u.size <= size_of(d) and u.trips.count <= d.trips:
                self.links[unit] = [place]
        self._explain_sums()

    def _explain_sums(self) -> None:
        """Explain one sum by each open reshard of a sum.

        XLA gives the sum the name and line of the op that made the parts, so devices and size
        decide; sums that are named a reshard come first.
        """
        used = {i for of in self.links.values() for i in of}
        left = [
            i
            for i, d in enumerate(self.declared)
            if d.kind == RESHARD_OF_A_SUM and d.live and i not in used
        ]
        sizes = {size_of(self.declared[i]) for i in left}
        units = (*self.open_units((RESHARD,)), *self.open_units(UNEXPLAINED))
        for unit in sorted(units, key=lambda unit: self.units[unit].size not in sizes):
            fits = (i for i in left if self._is_sum_of(unit, i))
            if (chosen := next(fits, None)) is not None:
                self.links[unit] = [chosen]
                left.remove(chosen)

    def _is_sum_of(self, unit: int, declared: int) -> bool:
        """Tell whether a unit may be the sum of a reshard, or a part of it."""
        u, d = self.units[unit], self.declared[declared]
        if d.asked_by and (u.source != d.source or made_by_autodiff(u.op_name)):
            return False
        same_devices = self.op_devices[u.op] == self.devices[declared]
        is_part = u.size > 0 and size_of(d) % u.size == 0
        return u.kind in _SUMS and same_devices and is_part and u.trips.count <= d.trips

    def explain_rules(self) -> None:
        """Explain what a rule of custom_partitioning sends, where the compiler marks its own."""
        live = (i for i, d in enumerate(self.declared) if d.primitive == RULE and d.live)
        rules_at = {self.declared[i].source: i for i in live}
        for unit in self.open_units(UNEXPLAINED):
            u = self.units[unit]
            is_rules = u.op_name.rpartition("/")[2] == RULE and not self.ops[u.op].marked
            if is_rules and u.source in rules_at:
                self.links[unit] = [rules_at[u.source]]

    def settle_loops(self) -> None:
        """Keep several units of one declaration only where their trips add up to its trips."""
        of_declared = self.units_of_declared()
        for i, units in of_declared.items():
            same = [u for u in units if self.units[u].size == size_of(self.declared[i])]
            if len(same) > 1 and self.left[i] != 0:
                for unit in same[1:]:
                    del self.links[unit]

    def settle_doubts(self) -> None:
        """Unlink a marked op whose arrays all have a match: one of them is the partitioner's."""
        doubtful: dict[int, list[int]] = defaultdict(list)
        for i, u in self.units.items():
            if u.doubtful:
                doubtful[u.op].append(i)
        for units in doubtful.values():
            if all(i in self.links for i in units):
                for i in units:
                    del self.links[i]

    def units_of_declared(self) -> dict[int, list[int]]:
        """Return the units that carry out each declaration."""
        found: dict[int, list[int]] = defaultdict(list)
        for unit, declared in self.links.items():
            for i in declared:
                found[i].append(unit)
        return found


def _with_sizes(unit: Unit, declared: Declared) -> Unit:
    """Return a custom call's unit with the sizes that its kernel's declaration gives it."""
    if not declared.size_known:
        return unit
    bits = 8 * jnp.dtype(declared.dtype).itemsize
    shape = Shape(declared.dtype, (declared.elements,), bits)
    return replace(unit, kind=REMOTE_DMA, shape=shape, elements=declared.elements, note="")


def _number_devices(numbers: dict[Hashable, int], one: Op | Declared) -> int:
    """Return a number for the devices that talk to each other: equal for equal ones."""
    return numbers.setdefault((one.groups, one.pairs), len(numbers))


def _split_by_credibility(
    declared: Sequence[Declared], devices: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Part the declarations: those that a compiler has to keep, and the dead and the doubles."""
    seen: set[Hashable] = set()
    certain: list[int] = []
    doubtful: list[int] = []
    for i, d in enumerate(declared):
        if d.primitive in CHOSEN_LATER or d.kind == REMOTE_DMA:
            continue
        value = d.kind, devices[i], d.operand
        (certain if d.live and value not in seen else doubtful).append(i)
        if d.live:
            seen.add(value)
    return certain, doubtful
