"""A step's metrics, averaged over batches."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from txcore.launch import watch
from txcore.launch.watch import Phase
from txcore.train.loggers import Metrics
from txcore.train.state.state import TrainState
from txcore.train.steps.means import add_batches
from txcore.train.steps.steps import Steps


def evaluate(steps: Steps, step: Any, state: TrainState, data: Iterable[Any]) -> Metrics:
    """Average metrics over batches, weighted by their real examples, as `Engine.evaluate` says."""
    parts: list[Metrics] = []
    weights: list[int] = []
    for host in data:
        batch = steps.place_for(step, state, host)
        state, compiled = steps.compile(step, state, batch, train=False)
        steps.come_to(compiled, state, batch.tree)
        watch.at(Phase.EVAL_STEP, label=compiled.last_words)
        metrics, count = compiled.call(state.arrays, batch.tree)
        weights.append(batch.examples if count is None else int(count))
        parts.append(jax.tree.map(np.asarray, metrics))
        if compiled.weighed is not None and sum(map(bool, weights)) > 1:
            raise ValueError(
                f"engine.evaluate weighs batches by their real examples, and {compiled.name} takes "
                f"a mean that weighs by {compiled.weighed}: over several batches that would be a "
                "mean of means. Return it as tx.Mean(total, count), which are added up: "
                "tx.Mean(*tx.psum((jnp.sum(values * mask), jnp.sum(mask)), axis))"
            )
    watch.at(Phase.BETWEEN_STEPS)
    if not parts:
        raise ValueError("engine.evaluate needs at least one real example, got none in data")
    return add_batches(parts, weights)
