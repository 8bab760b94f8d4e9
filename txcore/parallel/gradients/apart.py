"""Keep collectives apart that XLA would combine into one."""

from collections.abc import Callable, Sequence

import jax
from jax import lax

from txcore import _compat, varying
from txcore.kernels.dispatch.registry import current_device


def keep_apart(
    jobs: Sequence[Callable[[jax.Array], jax.Array]], arrays: Sequence[jax.Array], key: str
) -> list[jax.Array]:
    """Apply each job, which sends its array, so that XLA combines no two jobs' collectives.

    On GPU and TPU each job has a `combiner_key`, and they may run at the same time. XLA for CPU
    knows none: there each begins after the one before, which a barrier says (jax 0.10.2 removes
    it, and combines them all the same).

    Args:
      jobs: functions of one array.
      arrays: their arguments.
      key: what the keys start with; another one for each call.

    Returns:
      Their results.
    """
    if current_device()[0] != "cpu":
        results = []
        for i, (job, array) in enumerate(zip(jobs, arrays, strict=True)):
            with _compat.combiner_key(f"{key}/{i}"):
                results.append(job(array))
        return results
    results = []
    for job, array in zip(jobs, arrays, strict=True):
        if results:
            array, results[-1] = _order(array, results[-1])
        results.append(job(array))
    return results


def _order(array: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return both, where what uses the array waits for what comes before."""
    array, after = lax.optimization_barrier((array, before))
    # jax 0.10 types all results alike.
    added = _compat.varying_axes(after) - _compat.varying_axes(before)
    return array, varying.claim(after, "", (), drop=added) if added else after
