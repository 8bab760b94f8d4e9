"""How a kernel computes an update's equation: its operands, and its results in their places."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax


def make_update(
    update_arrays: Callable[..., tuple[jax.Array, ...]], equation: Callable[..., Any], count: int
) -> Callable[..., tuple[jax.Array, ...]]:
    """Return an update's op on checked operands, computed by a kernel.

    Args:
      update_arrays: `update_arrays(equation, arrays, scalars, dtypes, config)`, the kernel.
      equation: one of `equations`, of arrays and scalars, with the op's options.
      count: how many of the operands are arrays; the others are scalars.
    """

    def update(
        *operands: jax.Array, config: Any, dtypes: tuple[str, ...], **options: Any
    ) -> tuple[jax.Array, ...]:
        known = partial(equation, **options)
        return update_arrays(known, operands[:count], operands[count:], dtypes, config)

    return update


def order_results(results: Sequence[jax.Array], count: int) -> tuple[jax.Array, ...]:
    """Return an equation's results for `count` outputs: a further one is the parameter, to cast."""
    return (*results, *[results[0]] * (count - len(results)))


def aliases_of(arrays: int) -> dict[int, int]:
    """Return the result that lies in the place of each of so many arrays.

    In place, since callers donate the arrays: else XLA would copy the results there. All but the
    gradient, the second one, come back in order.
    """
    return {0: 0} | {place: place - 1 for place in range(2, arrays)}
