"""Numbers that are known in part: a constant times powers of unknown scalars."""

from collections.abc import Hashable
from dataclasses import dataclass
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
