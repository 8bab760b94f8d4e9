"""Facts about values while the factor of gradients is read, and their arithmetic.

A number is a monomial, known in part: a constant times powers of unknown scalars.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

Power = tuple[Hashable, int]


@dataclass(frozen=True)
class Monomial:
    """A constant times powers of scalars that have only names.

    Attributes:
      constant: the constant.
      powers: the name of each scalar, and its power, which is not 0.

    Example:
      >>> scale = Monomial(1.0, frozenset({("scale", 1)}))
      >>> Monomial(0.5).times(scale).over(scale)
      Monomial(constant=0.5, powers=frozenset())
    """

    constant: float
    powers: frozenset[Power] = frozenset()

    def times(self, other: "Monomial") -> "Monomial":
        """Return the product."""
        return Monomial(self.constant * other.constant, _add_powers(self.powers, other.powers, 1))

    def over(self, other: "Monomial") -> "Monomial":
        """Return the quotient; the other's constant is not 0."""
        return Monomial(self.constant / other.constant, _add_powers(self.powers, other.powers, -1))

    def has_kind(self, kind: str) -> bool:
        """Tell whether a scalar of this kind, the first part of its name, is in it."""
        return any(_kind_of(name) == kind for name, _ in self.powers)

    def without_kind(self, kind: str, power: int) -> "Monomial | None":
        """Return it without its only scalar of a kind, or None unless that has this power."""
        found = [(name, p) for name, p in self.powers if _kind_of(name) == kind]
        if len(found) != 1 or found[0][1] != power:
            return None
        return Monomial(self.constant, self.powers - {found[0]})


ONE = Monomial(1.0)


def _kind_of(name: Any) -> Any:
    return name[0] if isinstance(name, tuple) else name


def _add_powers(a: frozenset[Power], b: frozenset[Power], sign: int) -> frozenset[Power]:
    if not b:
        return a
    total = dict(a)
    for name, power in b:
        total[name] = total.get(name, 0) + sign * power
    return frozenset((name, power) for name, power in total.items() if power)


@dataclass(frozen=True)
class Gradient:
    """A value that is linear in what a backward pass starts from.

    Attributes:
      weight: the sum of the examples' weights; if `counted`, the weight of each example over the
        global count; None where it is not read.
      counted: whether `weight` is of one example.
      local: it has terms of this device's data.
      shared: it has terms that are the same on every device.
    """

    weight: Monomial | None
    counted: bool = False
    local: bool = True
    shared: bool = False


@dataclass(frozen=True)
class Value:
    """The facts about a value.

    Attributes:
      differs: it is made of data that differ along a data axis.
      number: the number that all its elements are, or None.
      gradient: its weights as a gradient, or None where it is none.
      reduced: the data axes over which the program has summed it.
      is_mean: each of these sums is divided by the number of devices.
      source: "file.py:12" of the last of them.
    """

    differs: bool = False
    number: Monomial | None = None
    gradient: Gradient | None = None
    reduced: frozenset[str] = frozenset()
    is_mean: bool = True
    source: str = ""

    @property
    def is_zero(self) -> bool:
        """Tell whether all its elements are known to be zero."""
        return self.number is not None and self.number.constant == 0


def sum_cotangents(value: Value, name: str, size: int) -> Value:
    """Return the facts about a value after autodiff sums it over `size` devices."""
    differs = name == "reduce_scatter"
    if value.number is not None:
        return Value(differs, number=value.number.times(Monomial(float(size))))
    return replace(value, differs=differs)


def join_ways(a: Gradient, b: Gradient) -> Gradient:
    """Return the sum of two branches of one backward pass: each example keeps its weight."""
    shared = a.shared or b.shared
    if a.local != b.local:
        return replace(a if a.local else b, shared=shared)
    same = a.counted == b.counted and _is_close(a.weight, b.weight)
    return replace(a, weight=a.weight if same else None, shared=shared)


def join_values(a: Value, b: Value) -> Value:
    """Return what is known of a value that may be either of two; a zero takes nothing away."""
    if a == b or b.is_zero:
        return replace(a, differs=a.differs or b.differs)
    if a.is_zero:
        return replace(b, differs=a.differs or b.differs)
    gradient = join_ways(a.gradient, b.gradient) if a.gradient and b.gradient else None
    is_mean, differs = a.is_mean and b.is_mean, a.differs or b.differs
    return Value(differs, None, gradient, a.reduced & b.reduced, is_mean, a.source)


def add_gradients(a: Value, b: Value) -> Value:
    """Return the sum of gradients of different backward passes: their weights add up."""
    if b.gradient is None:
        if b.differs or a.gradient is None:
            return replace(a, gradient=None)
        # A decay of the parameters: after the reduction it is right.
        return a if a.reduced else replace(a, gradient=replace(a.gradient, shared=True))
    assert a.gradient is not None
    gradient = join_ways(a.gradient, b.gradient)
    both_local = a.gradient.local and b.gradient.local
    if both_local and not gradient.counted and gradient.counted == b.gradient.counted:
        gradient = replace(gradient, weight=_add_weights(a.gradient.weight, b.gradient.weight))
    if a.reduced != b.reduced:
        gradient = replace(gradient, weight=None)
    is_mean = a.is_mean and b.is_mean
    return replace(a, gradient=gradient, reduced=a.reduced & b.reduced, is_mean=is_mean)


def scale_gradient(gradient: Gradient, number: Monomial | None) -> Gradient:
    """Return a gradient times a number, None being an unknown one."""
    weight = gradient.weight
    return replace(gradient, weight=weight.times(number) if weight and number else None)


def _add_weights(a: Monomial | None, b: Monomial | None) -> Monomial | None:
    if a is None or b is None or a.powers != b.powers:
        return None
    return Monomial(a.constant + b.constant, a.powers)


def _is_close(a: Monomial | None, b: Monomial | None) -> bool:
    if a is None or b is None or a.powers != b.powers:
        return False
    return math.isclose(a.constant, b.constant, rel_tol=1e-6)


def follow_trips(start: Value, first: Value, second: Value, trips: int | None) -> Value:
    """Return a carry after all trips, from its facts before them, after one and after two."""
    if second == first:
        return first
    before, after, later = start.gradient, first.gradient, second.gradient
    unread = Value(differs=start.differs or first.differs or second.differs)
    if after is None or later is None:
        return unread
    unread = replace(second, gradient=replace(later, weight=None))
    if trips is None or not (start.is_zero or before) or after.weight is None:
        return unread
    zero = Monomial(0.0, after.weight.powers)
    given = before.weight if before is not None else zero
    added = _add_weights(after.weight, given.times(Monomial(-1.0)) if given else None)
    if added is None or not _is_close(_add_weights(after.weight, added), later.weight):
        return unread
    total = _add_weights(given, added.times(Monomial(float(trips))))
    return replace(second, gradient=replace(later, weight=total))
