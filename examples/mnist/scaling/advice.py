"""What the runs advise, each sentence with the figures that it is taken from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
_BEYOND, _DRIFTS = 1.15, 0.1  # an efficiency that caches do not explain; of a step's time
_TELLS = 0.02  # of a rate: no smaller difference is worth a word


def give_advice(metrics: Mapping[str, Any]) -> list[str]:
    """Return what the runs say of threads, input workers and the learning rate."""
    noise = max(abs(metrics["drift"]), _TELLS)
    rows = [row for row in metrics["runs"] if row["throughput"]]
    said = [*_advise_threads(rows, noise, metrics), *_advise_input(rows, noise)]
    said += _advise_rate(rows)
    said = [*_find_doubts(metrics), *said]
    drift = f"the same step took {1 + metrics['drift']:.2f} of its time at the end"
    return [*said, f"noise: {drift}; differences below {noise:.0%} are not told apart"]


def _find_doubts(metrics: Mapping[str, Any]) -> list[str]:
    """Say where the figures cannot be the training's own: others had the cores meanwhile."""
    ideal = [row["name"] for row in metrics["runs"] if row.get("efficiency", 0) > _BEYOND]
    if not ideal and abs(metrics["drift"]) < _DRIFTS:
        return []
    why = f"{ideal[0]!r} beats its ideal" if ideal else "a step's time has changed meanwhile"
    return [f"DOUBTFUL: {why}: something else ran on these cores; repeat it on a quiet machine"]


def _advise_threads(rows: Rows, noise: float, metrics: Mapping[str, Any]) -> list[str]:
    """Say how to use the cores: threads of one worker, processes, or devices."""
    same = [row for row in rows if row["group"] in ("serial", "strong")]
    fit = [row for row in same if "prefetch" not in row["name"]]
    full = [row for row in fit if not row["oversubscribed"]]
    best = max(full, key=lambda row: row["throughput"])
    serial = rows[0]
    said = [
        f"threads: {best['name']!r} is the fastest on {metrics['cores']} cores, "
        f"{best['throughput'] / serial['throughput']:.2f} times the serial run's images/s"
    ]
    threads = next((row for row in fit if "all cores" in row["name"]), None)
    if threads is not None and best is not threads:
        ratio = threads["throughput"] / serial["throughput"]
        said[0] += f"; one worker with all cores reaches {ratio:.2f}"
    for row in fit:
        if row["oversubscribed"]:
            ratio = row["throughput"] / best["throughput"]
            verdict = "do not" if ratio < 1 + noise else "it gains here"
            said.append(
                f"oversubscribed: {row['name']} on {metrics['cores']} cores run at {ratio:.2f} of "
                f"{best['name']!r}: {verdict}"
            )
    return said


def _advise_input(rows: Rows, noise: float) -> list[str]:
    """Say whether reading ahead pays."""
    serial = rows[0]
    without = next((row for row in rows if "prefetch 0" in row["name"]), None)
    if without is None:
        return []
    ratio = serial["throughput"] / without["throughput"]
    told = "reading ahead on a thread (prefetch 2) runs at"
    text = f"input workers: {told} {ratio:.2f} of reading when a step is due"
    own = serial["seconds"]
    share = own["input_of_a_step"] / own["a_step"]
    verdict = ": keep it" if ratio > 1 + noise else ": no difference that can be told"
    verdict = ": it costs more than it hides" if ratio < 1 - noise else verdict
    return [f"{text}{verdict}; input adds {share:.1%} to a step"]


def _advise_rate(rows: Rows) -> list[str]:
    """Say for each larger batch whether to scale the learning rate with it."""
    said = []
    weak = [row for row in rows if row["group"] == "weak" and row["way"] == "processes"]
    for n in sorted({row["workers"] for row in weak}):
        own = {row["rate_scaling"]: row["accuracy"] for row in weak if row["workers"] == n}
        if len(own) == 2:
            row = next(row for row in weak if row["workers"] == n)
            gain = own["linear"] - own["none"]
            noise = _noise_of_accuracies(own["linear"], own["none"], row["test_examples"])
            verdict = "scale it" if gain > 0 else "do not scale it"
            verdict = verdict if abs(gain) > noise else "either, they cannot be told apart"
            said.append(
                f"learning rate: batch {row['batch_size']} after as many examples: "
                f"{100 * own['none']:.2f}% at the same rate, {100 * own['linear']:.2f}% at {n} "
                f"times it (noise {100 * noise:.2f} points): {verdict}"
            )
    return said


def _noise_of_accuracies(first: float, second: float, examples: int) -> float:
    """Return two standard errors of the difference of two accuracies.

    Example:
      >>> round(_noise_of_accuracies(0.5, 0.5, 10_000), 4)
      0.0141
    """
    return 2 * math.sqrt((first * (1 - first) + second * (1 - second)) / examples)
