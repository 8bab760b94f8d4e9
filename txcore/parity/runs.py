"""Compare two runs of anything, outside of an engine's step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from txcore import _compat
from txcore.parity.agreement import Agreement, name_factors
from txcore.parity.operations import Side, find_first_difference
from txcore.parity.recording import recording


def assert_runs_agree(
    first: Callable[[], Any],
    second: Callable[[], Any],
    *,
    axes: Mapping[str, int] | None = None,
    counts: Mapping[str, int] | None = None,
    context: str | None = None,
    row_axes: tuple[str, ...] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> None:
    """Check that two functions return the same numbers, leaf by leaf.

    For a model of your own outside of an engine's step: a `shard_map` against the same on one
    device, a new implementation against the old one. Where they differ, both are called once more,
    and what they record (`record`) says at which operation they part first.

    Args:
      first: without arguments; returns a pytree of global arrays, as {"loss": ..., "grads": ...}.
        The reference.
      second: returns a pytree of the same structure.
      axes: the size of each mesh axis by name: what a ratio may come from.
      counts: other numbers that it may come from, by what they count: {"microbatches": 4}.
      context: the axis along which the second's devices hold the sequence as
        `tx.context.split_chunks` deals it out.
      row_axes: the axes along which the devices of the second have different examples, or layers;
        of what others hold, each has to be right. None: of all devices one has to be.
      rtol: relative tolerance.
      atol: absolute tolerance, as a share of the leaf's largest value.

    Raises:
      AssertionError: naming the leaf, how many of its elements differ, the ratio between the two,
        what usually causes it, and the first recorded operation that differs.

    Example:
      >>> def run(scale):
      ...     def f(x):
      ...         return tx.psum(tx.testing.record(scale * x, "scaled").sum(0), "data")
      ...     return lambda: tx.testing.run_sharded(
      ...         f, np.arange(8.0).reshape(4, 2), axes={"data": 2}, out_specs=P())
      >>> tx.testing.assert_runs_agree(run(1), run(1))
      >>> try:
      ...     tx.testing.assert_runs_agree(run(1), run(3))
      ... except AssertionError as error:
      ...     print(str(error).splitlines()[1][-40:])
      4 of 4 examples, 3 times the reference's
    """
    factors = name_factors([axes or {}], counts or {})
    results = [_to_float64(run()) for run in (first, second)]
    agreement = Agreement("the results", factors, rtol, atol, between="runs")
    try:
        agreement.check("", *results)
    except AssertionError as error:
        sides = []
        for run, where in ((first, (None, None)), (second, (row_axes, context))):
            with recording() as found:
                jax.block_until_ready(run())
            sides.append(Side(found, *where))
        text = find_first_difference(*sides, factors=factors, rtol=rtol)
        raise AssertionError(f"{error}\n{text}") from None


def _to_float64(tree: Any) -> Any:
    def convert(leaf: Any) -> np.ndarray:
        return np.asarray(jax.random.key_data(leaf) if _compat.is_key_array(leaf) else leaf, float)

    return jax.tree.map(convert, tree)
