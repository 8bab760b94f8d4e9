"""The order of an update's results and the operands whose place they take, the same everywhere."""

from collections.abc import Sequence

import jax


def order_results(results: Sequence[jax.Array], count: int) -> tuple[jax.Array, ...]:
    """Return an equation's results for `count` outputs: a further one is the parameter, to cast."""
    return (*results, *[results[0]] * (count - len(results)))


def aliases_of(arrays: int) -> dict[int, int]:
    """Return the result that lies in the place of each of so many arrays.

    In place, since callers donate the arrays: else XLA would copy the results there. All but the
    gradient, the second one, come back in order.
    """
    return {0: 0} | {place: place - 1 for place in range(2, arrays)}
