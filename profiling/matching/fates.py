"""Tell what became of each declared collective in the compiled program."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

import jax.numpy as jnp

from txcore.profiling.declared.collectives import CHOSEN_LATER, Declared
from txcore.profiling.matching.arrays import Unit, size_of

# Linear: one collective of a + b may replace one of a and one of b.
LINEAR = ("all-reduce", "reduce-scatter", "all-gather")


def fates_of(
    declared: Sequence[Declared],
    devices: Sequence[int],
    units: Sequence[Unit],
    links: Sequence[Sequence[int]],
) -> tuple[tuple[str, ...], ...]:
    """Name what became of each declaration, see `txcore.profiling.Fate`.

    Args:
      declared: the declarations.
      devices: of each, a number for the devices that talk to each other.
      units: the arrays of the compiled program.
      links: of each unit, the places of the declarations that it carries out.
    """
    carried: dict[int, list[Unit]] = defaultdict(list)
    shared = Counter(unit.op for unit, link in zip(units, links, strict=True) for _ in link)
    for unit, link in zip(units, links, strict=True):
        for i in link:
            carried[i].append(unit)

    def twin_key(place: int, what: int) -> Hashable:
        return declared[place].kind, devices[place], what

    equal = {twin_key(i, declared[i].operand) for i in carried}
    as_large = {twin_key(i, declared[i].elements) for i in carried}
    fates: list[tuple[str, ...]] = []
    for i, d in enumerate(declared):
        if d.primitive in CHOSEN_LATER:
            fates.append(("kept",) if i in carried else ("eliminated",))
        elif d.simulated:
            fates.append(("simulated",))
        elif i in carried:
            fates.append(_fates_of_kept(d, carried[i], shared))
        elif not d.live or d.foldable:
            fates.append(("eliminated",))
        elif twin_key(i, d.operand) in equal:
            fates.append(("deduplicated",))
        elif d.kind in LINEAR and twin_key(i, d.elements) in as_large:
            fates.append(("reassociated",))
        else:
            fates.append(("missing",))
    return tuple(fates)


def _fates_of_kept(
    d: Declared, units: Sequence[Unit], shared: Mapping[int, int]
) -> tuple[str, ...]:
    trips = sum(u.trips.count for u in units)
    known = d.trips_known and all(u.trips.known for u in units)

    def is_alone(unit: Unit) -> bool:
        return shared[unit.op] == 1

    def is_rewritten(unit: Unit) -> bool:
        # A custom call is a kernel whose sizes are not known.
        other = unit.kind not in (d.kind, "custom-call")
        return other or (is_alone(unit) and unit.size > size_of(d))

    bits = 8 * jnp.dtype(d.dtype).itemsize
    is_cut = any(u.size < size_of(d) for u in units) and d.size_known
    fates = {
        "combined": not all(map(is_alone, units)) and not is_cut,
        "split": is_cut,
        "unrolled": len(units) > 1 and not is_cut,
        "hoisted": known and not is_cut and trips < d.trips,
        "rewritten": any(map(is_rewritten, units)),
        "promoted": any(u.shape.bits > bits for u in units),
        "narrowed": any(8 <= u.shape.bits < bits for u in units) and not is_cut,
    }
    return tuple(name for name, is_so in fates.items() if is_so) or ("kept",)
