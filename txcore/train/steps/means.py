"""Metrics that are means over something else than examples: a total and a count."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Mean(NamedTuple):
    """A metric as a total and the count to divide it by, both of the whole global batch.

    `engine.evaluate` adds up totals and counts over the batches, so that the mean over tokens, or a
    weighted one, is that of the whole data, however they are distributed over batches. A training
    step reports the quotient (0 where nothing is counted).

    Attributes:
      total: the sum of the values that count.
      count: how many they are, or the sum of their weights.

    Example:
      >>> def eval_step(state, batch):
      ...     kept = batch["losses"] * batch["mask"]  # (batch, length)
      ...     total, count = kept.sum(), batch["mask"].sum()
      ...     return {"loss": tx.Mean(*tx.psum((total, count), "data"))}
      >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), optimizer=tx.optim.sgd(0.1),
      ...                    plan=tx.Plan(data_parallel=tx.DP("data")))
      >>> losses, mask = np.array([[1.0, 2.0], [6.0, 99.0]]), np.array([[1.0, 1.0], [1.0, 0.0]])
      >>> state = engine.create_state({"w": np.zeros(3, np.float32)})
      >>> engine.evaluate(eval_step, state, [{"losses": losses, "mask": mask}])
      {'loss': 3.0}
    """

    total: Any
    count: Any


def is_mean(metric: Any) -> bool:
    """Tell whether a metric is a total and a count."""
    return isinstance(metric, Mean)


def all_are_means(metrics: dict[str, Any]) -> bool:
    """Tell whether every metric is a total and a count."""
    return all(map(is_mean, jax.tree.leaves(metrics, is_leaf=is_mean)))


def divide_means(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return metrics with the quotient of each total and its count."""

    def divide(metric: Any) -> Any:
        if not is_mean(metric):
            return metric
        none = metric.count == 0
        mean = metric.total / jnp.where(none, jnp.ones_like(metric.count), metric.count)
        return jnp.where(none, jnp.zeros_like(mean), mean)

    return jax.tree.map(divide, metrics, is_leaf=is_mean)


def find_other_weights(metrics: dict[str, Any], weighed: list[str], mask: Any) -> str | None:
    """Return what the means of an evaluation weigh by, if not all by the batch's real examples."""
    if all_are_means(metrics):
        return None
    other = [what for what in weighed if what != "examples"]
    if weighed and not other and mask is None:
        return "a mask that is not batch['mask']"
    return other[0] if other else None


def add_batches(metrics: list[dict[str, Any]], weights: list[int]) -> dict[str, Any]:
    """Return the metrics over all batches, as Python floats.

    Args:
      metrics: of each batch, on the host.
      weights: how many real examples each has.

    Raises:
      ValueError: a metric has no batch in which anything counts.
    """

    def add(path: Any, *parts: Any) -> Any:
        pairs = parts if is_mean(parts[0]) else map(_weigh_mean, parts, weights)
        total, count = np.sum([np.array([*pair], np.float64) for pair in pairs], axis=0)
        if not np.all(count):
            raise ValueError(
                "engine.evaluate needs at least one real example, got none in data: there is "
                f"nothing to average metrics{jax.tree_util.keystr(path)} over"
            )
        return np.asarray(total / count).tolist()

    return jax.tree_util.tree_map_with_path(add, *metrics, is_leaf=is_mean)


def _weigh_mean(mean: Any, weight: int) -> Mean:
    """Return a mean over so many examples; of a batch of padding alone it may be NaN."""
    total = weight * np.asarray(mean, np.float64) if weight else np.zeros(np.shape(mean))
    return Mean(total, np.full(np.shape(mean), weight))
