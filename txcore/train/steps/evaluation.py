"""A step's metrics, averaged over batches."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from txcore.launch import watch
from txcore.launch.watch import Phase
from txcore.train.loggers import Metrics
from txcore.train.state.state import TrainState
from txcore.train.steps.steps import Steps


def evaluate(steps: Steps, step: Any, state: TrainState, data: Iterable[Any]) -> Metrics:
    """Average metrics over batches, weighted by their real examples, as `Engine.evaluate` says."""
    parts: list[Metrics] = []
    seen = 0
    for host in data:
        batch = steps.place_for(step, state, host)
        state, compiled = steps.compile(step, state, batch, train=False)
        steps.come_to(compiled, state, batch.tree)
        watch.at(Phase.EVAL_STEP, label=compiled.last_words)
        metrics, count = compiled.call(state.arrays, batch.tree)
        weight = batch.examples if count is None else int(count)
        if weight:  # a batch of padding alone has no mean
            parts.append(jax.tree.map(lambda m, w=weight: w * np.asarray(m, np.float64), metrics))
            seen += weight
    watch.at(Phase.BETWEEN_STEPS)
    if not seen:
        raise ValueError("engine.evaluate needs at least one real example, got none in data")
    return jax.tree.map(lambda *part: (sum(part) / seen).tolist(), *parts)
