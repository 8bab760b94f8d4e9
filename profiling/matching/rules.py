"""The rules by which an array of a compiled program and a declared collective are the same one."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from txcore.profiling.declared.collectives import Declared
from txcore.profiling.matching.arrays import Unit, size_of

# The kinds with which compilers replace another of the same S: a reduce-scatter for a sum that is
# used in part, a sum and its slice, a sum of parts that are zero elsewhere.
_REWRITTEN = {
    "all-reduce": ("reduce-scatter",),
    "reduce-scatter": ("all-reduce",),
    "all-gather": ("all-reduce", "collective-broadcast"),
    "collective-broadcast": ("all-reduce", "collective-permute"),
}


@dataclass(frozen=True)
class Rule:
    """What a unit (with one of its claims) and a declaration must share to match.

    Attributes:
      of_unit, of_declared: keys that must be equal.
      fits: what must hold besides.
    """

    of_unit: Callable[[Unit, str | None], Hashable]
    of_declared: Callable[[Declared], Hashable]
    fits: Callable[[Unit, Declared], bool] = lambda unit, declared: True


def _has_enough_trips(unit: Unit, d: Declared) -> bool:
    return unit.trips.count <= d.trips or not (unit.trips.known and d.trips_known)


PLAIN = (
    Rule(
        lambda u, tag: (u.kind, tag, u.size, u.trips.count, u.source),
        lambda d: (d.kind, d.tag, size_of(d), d.trips, d.source),
    ),
    Rule(
        lambda u, tag: (u.kind, tag, u.size, u.trips.count),
        lambda d: (d.kind, d.tag, size_of(d), d.trips),
    ),
)
LOOPS = Rule(
    lambda u, tag: (u.kind, tag, u.size), lambda d: (d.kind, d.tag, size_of(d)), _has_enough_trips
)
SHARDED = Rule(
    lambda u, tag: (u.kind, tag, u.trips.count),
    lambda d: (d.kind, d.tag, d.trips),
    lambda u, d: not d.size_known and u.size > 0 and size_of(d) % u.size == 0,
)
REWRITE = Rule(
    lambda u, tag: (tag, u.size, u.trips.count),
    lambda d: (d.tag, size_of(d), d.trips),
    lambda u, d: u.kind in _REWRITTEN.get(d.kind, ()),
)
# XLA for TPU sends rows of 128.
PADDED = Rule(
    lambda u, tag: (u.kind, tag, u.trips.count),
    lambda d: (d.kind, d.tag, d.trips),
    lambda u, d: u.kind == "ragged-all-to-all" and u.size % max(size_of(d), 1) == 0,
)
UNTAGGED = Rule(
    lambda u, tag: (u.kind, u.size, u.trips.count, tag is None),
    lambda d: (d.kind, size_of(d), d.trips, True),
)
RENAMED = Rule(
    lambda u, tag: (u.kind, u.size, u.trips.count),
    lambda d: (d.kind, size_of(d), d.trips),
)


def _kernel_of(unit: Unit) -> str:
    """Return the name of the kernel that a custom call runs: the last but one part of its path."""
    return ([""] + unit.op_name.split("/"))[-2]


# Of a custom call, whose sizes its line does not have, with the kernel that it runs.
KERNELS = (
    Rule(
        lambda u, tag: (tag, _kernel_of(u), u.trips.count, u.source),
        lambda d: (d.tag, d.kernel, d.trips, d.source),
    ),
    Rule(
        lambda u, tag: (tag, _kernel_of(u), u.trips.count),
        lambda d: (d.tag, d.kernel, d.trips),
    ),
    Rule(lambda u, tag: tag, lambda d: d.tag, _has_enough_trips),
)
