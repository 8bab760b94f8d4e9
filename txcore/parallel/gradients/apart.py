"""Keep collectives apart that XLA would combine into one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from txcore import _compat
from txcore.kernels.dispatch.registry import current_device
from txcore.parallel.parts import typed_as


def keep_apart(
    jobs: Sequence[Callable[[Any], Any]], arguments: Sequence[Any], key: str
) -> list[Any]:
    """Apply each job, which sends its argument, so that XLA combines no two jobs' collectives.

    On GPU and TPU each job has a `combiner_key`, and they may run at the same time. XLA for CPU
    knows none: there each begins after the one before, which a barrier says (jax 0.10.2 removes
    it, and combines them all the same).

    Args:
      jobs: functions of one pytree of arrays.
      arguments: a pytree for each.
      key: what the keys start with; another one for each call.

    Returns:
      Their results, pytrees of arrays.
    """
    if current_device()[0] != "cpu":
        results = []
        for i, (job, argument) in enumerate(zip(jobs, arguments, strict=True)):
            with _compat.combiner_key(f"{key}/{i}"):
                results.append(job(argument))
        return results
    results = []
    for job, argument in zip(jobs, arguments, strict=True):
        if results:
            argument, results[-1] = _order_trees(argument, results[-1])
        results.append(job(argument))
    return results


def _order_trees(later: Any, before: Any) -> tuple[Any, Any]:
    """Return both, where what uses the first waits for the second."""
    both = later, before
    ordered: tuple[Any, Any] = jax.tree.map(typed_as, lax.optimization_barrier(both), both)
    return ordered
