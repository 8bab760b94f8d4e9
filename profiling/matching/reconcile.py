"""Reconcile two modules of one program.

Right after partitioning, each collective stands alone with its own origin: that early module tells
who asked for it. The optimized module, after merging, moving and rewriting, shows what is sent.
Where the optimized module alone leaves a doubt:

- an undeclared collective takes its origin and line from the early module
- a collective that is undeclared early and gone later was merged into one that looks declared
- a later collective without a match, where all early ones are declared, is a rewritten declared
  one, or several that were folded into one over all their axes
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

from txcore.profiling.declared.collectives import RESHARD, Declared
from txcore.profiling.hlo import Groups, Op
from txcore.profiling.hlo.groups import fold_groups
from txcore.profiling.matching.arrays import Unit, size_of
from txcore.profiling.matching.fates import LINEAR
from txcore.profiling.matching.match import Matched
from txcore.profiling.matching.origin import UNEXPLAINED

_MOST_FOLDED = 4  # sums after one another that became one: over as many axes of a mesh
_LOST = (("missing",), ("reassociated",))
_Way = Callable[[Unit, Hashable], Hashable]
# The properties by which an array of the optimized module is paired with its early one.
_WAYS: tuple[_Way, ...] = (
    lambda unit, devices: (unit.kind, devices, unit.size, unit.op_name),
    lambda unit, devices: (unit.kind, devices, unit.size, unit.origin),
    lambda unit, devices: (unit.kind, devices, unit.size),
    lambda unit, devices: (devices, unit.size),  # rewritten as another kind
    lambda unit, devices: devices,
)


def reconcile_modules(
    final: Matched,
    ops: Sequence[Op],
    early: Matched,
    early_ops: Sequence[Op],
    declared: Sequence[Declared],
) -> Matched:
    """Correct the match of the optimized module by that of the partitioned one.

    Args:
      final, ops: the match of the optimized module, and its collectives.
      early, early_ops: those of the module right after partitioning.
      declared: what both were matched with.

    Returns:
      The match of the optimized module, corrected.
    """
    state = _State(final, ops, early, early_ops, declared)
    state.name_what_is_open()
    state.find_what_is_hidden()
    state.explain_rewritten()
    return Matched(tuple(state.units), tuple(state.links), tuple(state.fates))


class _State:
    """The match of the optimized module while it is corrected."""

    def __init__(
        self,
        final: Matched,
        ops: Sequence[Op],
        early: Matched,
        early_ops: Sequence[Op],
        declared: Sequence[Declared],
    ):
        self.ops, self.early, self.early_ops, self.declared = ops, early, early_ops, declared
        self.units, self.links = list(final.units), list(final.links)
        self.fates = list(final.fates)
        paired = enumerate(zip(early.units, early.links, strict=True))
        # A reshard that was asked for is known by the copy after it, which only this module has.
        self.left = {i for i, (u, link) in paired if not link or u.origin == RESHARD}
        self.blamed: set[int] = set()  # arrays that are something added
        self.added = {i for i in self.left if not early.links[i] and not _is_opaque(early.units[i])}

    def name_what_is_open(self) -> None:
        """Give unexplained arrays their origin and line from the early module."""
        for place, i in self._pair_arrays([p for p, link in enumerate(self.links) if not link]):
            self.links[place] = self.early.links[i]
            for d in self.links[place]:
                self.fates[d] = ("kept",)
            if i in self.added:
                self.blamed.add(place)
            self.units[place] = _with_early_origin(self.units[place], self.early.units[i])

    def find_what_is_hidden(self) -> None:
        """Blame the declared arrays that contain an added one."""
        self.left &= self.added
        for place, i in self._pair_arrays([p for p, link in enumerate(self.links) if link]):
            unit, renamed = (
                self.units[place],
                _with_early_origin(self.units[place], self.early.units[i]),
            )
            self.units[place] = replace(unit, origin=renamed.origin, added=renamed.source)

    def _pair_arrays(self, places: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield (array, early array) for arrays that both modules have, the surest pairs first."""
        open_places = list(places)
        for way in _WAYS:
            waiting: dict[Hashable, list[int]] = defaultdict(list)
            for i in sorted(self.left, reverse=True):
                unit = self.early.units[i]
                waiting[way(unit, _devices_of(self.early_ops[unit.op]))].append(i)
            for place in list(open_places):
                unit = self.units[place]
                if found := waiting.get(way(unit, _devices_of(self.ops[unit.op]))):
                    i = found.pop()
                    self.left.remove(i)
                    open_places.remove(place)
                    yield place, i

    def explain_rewritten(self) -> None:
        """Explain open arrays by lost declarations, where nothing was added among those devices."""
        unseen = self.added & self.left
        added_on = {_devices_of(self.early_ops[self.early.units[i].op]) for i in unseen}
        lost: dict[Hashable, dict[int, int]] = defaultdict(dict)  # what is not sent yet, by place
        for i, d in enumerate(self.declared):
            if self.fates[i] in _LOST:
                lost[_devices_of(d)][i] = size_of(d) * d.trips
        self._explain_folded(added_on)
        for of_devices in lost.values():  # what is left of it
            for i in [i for i in of_devices if self.fates[i] not in _LOST]:
                del of_devices[i]
        for place, unit in enumerate(self.units):
            devices = _devices_of(self.ops[unit.op])
            is_open = not self.links[place] and place not in self.blamed
            if not is_open or _is_opaque(unit) or devices in added_on:
                continue
            self.links[place] = tuple(self._choose_lost(unit, lost[devices]))
            for i in self.links[place]:
                self.fates[i] = ("rewritten",)
        self._settle_sums(lost)

    def _explain_folded(self, added_on: set[Hashable]) -> None:
        """Explain an open sum over several axes by lost ones over each, one after the other.

        XLA for GPU folds a sum of a sum (over the stages, then over the data axis) into one.
        """
        for place, unit in enumerate(self.units):
            op = self.ops[unit.op]
            is_open = not self.links[place] and place not in self.blamed
            if unit.kind != "all-reduce" or not is_open or _devices_of(op) in added_on:
                continue
            sizes = [piece.size for piece in unit.pieces] or [unit.size]
            if chosen := self._choose_folded(op.groups, sizes, unit.trips.count):
                self.links[place] = tuple(chosen)
                for i in chosen:
                    self.fates[i] = ("rewritten",)

    def _choose_folded(self, groups: Groups, sizes: Sequence[int], trips: int) -> list[int]:
        """Take for each array a lost sum over each of the axes that make up these groups."""
        lost: dict[Groups, list[int]] = defaultdict(list)
        for i, d in enumerate(self.declared):
            if self.fates[i] in _LOST and d.kind == "all-reduce" and d.trips == trips:
                lost[d.groups].append(i)
        for number in range(2, _MOST_FOLDED + 1):
            for along in itertools.combinations(lost, number):
                if _fold_all(along) != groups:
                    continue
                waiting = {one: list(lost[one]) for one in along}
                chosen = [_take_size(waiting[g], s, self.declared) for g in along for s in sizes]
                if None not in chosen:
                    return [i for i in chosen if i is not None]
        return []

    def _settle_sums(self, lost: dict[Hashable, dict[int, int]]) -> None:
        """Find for each declaration that is still lost an equal one that does its work."""
        carried = [self.declared[i] for i in {i for link in self.links for i in link}]
        equal = {(d.kind, _devices_of(d), d.operand) for d in carried}
        as_large = {(d.kind, _devices_of(d), d.elements) for d in carried if d.kind in LINEAR}
        for i in (i for of_devices in lost.values() for i in of_devices):
            d = self.declared[i]
            if (d.kind, _devices_of(d), d.operand) in equal:
                self.fates[i] = ("deduplicated",)
            elif (d.kind, _devices_of(d), d.elements) in as_large:
                self.fates[i] = ("reassociated",)

    def _choose_lost(self, unit: Unit, lost: dict[int, int]) -> list[int]:
        """Take the declarations that a rewritten unit replaces: by size, else the nearest."""
        sent = unit.size * unit.trips.count
        nearest = sorted(lost, key=lambda i: self.declared[i].source != unit.source)
        whole = [i for i in nearest if lost[i] == sent]
        of_a_loop = [
            i for i in nearest if lost[i] > sent and size_of(self.declared[i]) == unit.size
        ]
        if of_a_loop and not whole:
            lost[of_a_loop[0]] -= sent
            return of_a_loop[:1]
        chosen = whole[:1] or (nearest if sum(lost.values()) == sent else nearest[:1])
        for i in chosen:
            del lost[i]
        return chosen


def _devices_of(one: Op | Declared) -> Hashable:
    return one.groups, one.pairs


def _fold_all(groups: Sequence[Groups]) -> Groups | None:
    folded: Groups | None = groups[0]
    for one in groups[1:]:
        folded = None if folded is None else fold_groups(folded, one)
    return folded


def _take_size(waiting: list[int], size: int, declared: Sequence[Declared]) -> int | None:
    """Take the first of these declarations that is of a size."""
    found = next((i for i in waiting if size_of(declared[i]) == size), None)
    if found is not None:
        waiting.remove(found)
    return found


def _is_opaque(unit: Unit) -> bool:
    return unit.kind in ("custom-call", "unknown")


def _with_early_origin(unit: Unit, early: Unit) -> Unit:
    # What looks like the user's and is not was inserted for what uses it.
    is_known = early.origin in (*UNEXPLAINED, RESHARD)
    at_use = bool(early.wanted_source) and not is_known
    line, place = (
        (early.wanted_source, early.wanted_place) if at_use else (early.source, early.place)
    )
    origin = early.origin if is_known else "partitioner"
    name = early.op_name or unit.op_name
    found = replace(unit, origin=origin, source=line, place=place, note=early.note, op_name=name)
    return replace(found, laid=early.laid, dim=early.dim) if early.kind == unit.kind else found
