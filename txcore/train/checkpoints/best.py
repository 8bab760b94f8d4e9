"""Choose the best checkpoint by a metric of `evaluate`."""

import math
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from txcore.train.checkpoints import manifest
from txcore.train.checkpoints.manifest import CheckpointError, Metric

KeepBest = tuple[str, str]  # a metric's name, and "max" or "min"


def check_keep_best(keep_best: Any) -> KeepBest | None:
    """Return the value of `Checkpoints(keep_best=)`; refuse a wrong one."""
    if keep_best is None:
        return None
    if isinstance(keep_best, (tuple, list)) and len(keep_best) == 2:
        name, mode = keep_best
        if isinstance(name, str) and mode in ("max", "min"):
            return name, mode
    raise ValueError(
        "Checkpoints needs keep_best= the name of a metric that evaluate= returns, and 'max' or "
        f"'min', as in ('accuracy', 'max'), got {keep_best!r}"
    )


def find_metric(keep_best: KeepBest, metrics: Mapping[str, Any]) -> Metric | None:
    """Return the metric that decides which checkpoint is best; None if it is not finite.

    Raises:
      CheckpointError: the evaluation did not return it, or it is not a number.
    """
    name, mode = keep_best
    given = f"Checkpoints(keep_best={keep_best}) needs evaluate= to return the metric {name!r}"
    if name not in metrics:
        found = ", ".join(map(repr, metrics)) or "none"
        raise CheckpointError(f"{given}, got {found}: name one of those, or return it")
    value = metrics[name]
    if not isinstance(value, numbers.Real):
        raise CheckpointError(f"{given} as one number, got {value!r}: return a scalar")
    return Metric(name, mode, float(value)) if math.isfinite(value) else None


def try_find_metric(
    keep_best: KeepBest | None, metrics: Mapping[str, Any] | None
) -> tuple[Metric | None, CheckpointError | None]:
    """Return the metric that decides which checkpoint is best, and an error instead of raising it.

    Both are None where no metric is asked for, or nothing was evaluated.
    """
    if keep_best is None or metrics is None:
        return None, None
    try:
        return find_metric(keep_best, metrics), None
    except CheckpointError as lacks:
        return None, lacks


def is_better(metric: Metric, than: Metric) -> bool:
    """Tell whether a metric is better than another of the same name and mode."""
    return metric.value > than.value if metric.mode == "max" else metric.value < than.value


def best_of(found: Iterable[tuple[str, Metric]], name: str, mode: str) -> tuple[str, Metric] | None:
    """Return the best of several checkpoints, the oldest of equal ones.

    Args:
      found: names of checkpoints with their metrics, the oldest first.
      name: the metric that counts; checkpoints with another one are left out.
      mode: "max" or "min".
    """
    best = None
    for checkpoint, metric in found:
        if metric[:2] != (name, mode):
            continue
        if best is None or is_better(metric, best[1]):
            best = checkpoint, metric
    return best


def metrics_in(directory: Path, names: Iterable[str]) -> list[tuple[str, Metric]]:
    """Return the checkpoints that have a metric, each with its metric, in the order given."""
    found = []
    for name in names:
        try:
            metric = manifest.read_manifest(directory / name).metric
        except CheckpointError:  # damaged: reported on resume
            continue
        if metric is not None:
            found.append((name, metric))
    return found
