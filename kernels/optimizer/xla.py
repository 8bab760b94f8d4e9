"""The updates in XLA's own elementwise ops, which its compiler fuses.

XLA:CPU makes one loop for each result, and the loops after the first read its result again: SGD
moves 24 bytes for each parameter in place, where a single loop would move 20. Of what was tried on
jax 0.10 and 0.12 nothing is faster. A scan or a while loop over blocks is 2 to 200 times slower,
since it copies the whole arrays, some of them in each turn. A barrier after the velocity and a
second computation of it make no difference.
"""

from collections.abc import Callable

import jax

from txcore.kernels.optimizer import equations
from txcore.kernels.optimizer.results import make_update, order_results


def _update_arrays(
    equation: Callable[..., tuple[jax.Array, ...]],
    arrays: tuple[jax.Array, ...],
    scalars: tuple[jax.Array, ...],
    dtypes: tuple[str, ...],
    config: None,
) -> tuple[jax.Array, ...]:
    wide = scalars[0].dtype  # the scalars' dtype is the one to compute in
    results = order_results(equation(*(x.astype(wide) for x in arrays), *scalars), len(dtypes))
    return tuple(x.astype(dtype) for x, dtype in zip(results, dtypes, strict=True))


sgd_momentum = make_update(_update_arrays, equations.sgd_momentum, 3)
adamw = make_update(_update_arrays, equations.adamw, 4)
