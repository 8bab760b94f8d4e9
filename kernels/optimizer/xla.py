"""The updates in XLA's own elementwise ops, which its compiler fuses.

XLA:CPU makes one loop for each result, and the loops after the first read its result again: SGD
moves 24 bytes for each parameter in place, where a single loop would move 20. Of what was tried on
jax 0.10 and 0.12 nothing is faster. A scan or a while loop over blocks is 2 to 200 times slower,
since it copies the whole arrays, some of them in each turn. A barrier after the velocity and a
second computation of it make no difference.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from txcore.kernels.optimizer import equations
from txcore.kernels.optimizer.results import order_results


def sgd_momentum(
    *operands: jax.Array, config: None, dtypes: tuple[str, ...], **options: Any
) -> tuple[jax.Array, ...]:
    """Compute the op of `txcore.kernels.sgd_momentum` on checked operands."""
    return _update_arrays(partial(equations.sgd_momentum, **options), operands, dtypes)


def adamw(
    *operands: jax.Array, config: None, dtypes: tuple[str, ...], **options: Any
) -> tuple[jax.Array, ...]:
    """Compute the op of `txcore.kernels.adamw` on checked operands."""
    return _update_arrays(partial(equations.adamw, **options), operands, dtypes)


def _update_arrays(
    equation: Callable[..., tuple[jax.Array, ...]],
    operands: tuple[jax.Array, ...],
    dtypes: tuple[str, ...],
) -> tuple[jax.Array, ...]:
    wide = operands[-1].dtype  # the scalars' dtype is the one to compute in
    results = order_results(equation(*(x.astype(wide) for x in operands)), len(dtypes))
    return tuple(x.astype(dtype) for x, dtype in zip(results, dtypes, strict=True))
