"""Throughput: agreement of the contenders first, then rounds in which each runs once."""

import dataclasses
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pool import PeerError

AGREE_STEPS = 10
# Of the losses, relative. bfloat16 keeps 8 bits of each factor.
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}
WARM_STEPS = 5  # before each timing: the caches hold another contender's data


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast one contender is as another, in the same rounds."""

    median: float
    low: float
    high: float


def check_agreement(
    losses: Mapping[str, Sequence[float]], precisions: Mapping[str, str]
) -> dict[str, float]:
    """Check that the first losses of all contenders are the same.

    Args:
      losses: of each contender's first steps.
      precisions: of each contender. The reference is the median of those in float32, or of all
        where there is none.

    Returns:
      Each contender's largest relative deviation from the reference.

    Raises:
      PeerError: a contender deviates by more than its precision allows.
    """
    exact = [x for name, x in losses.items() if precisions[name] == "float32"]
    reference = [statistics.median(x) for x in zip(*(exact or losses.values()), strict=True)]
    deviations = {
        name: max(abs(x - r) / abs(r) for x, r in zip(own, reference, strict=True))
        for name, own in losses.items()
    }
    # A comparison with nan is false, so this asks for what holds rather than for what does not.
    wrong = [
        f"{name} by {deviation:.2g} (allowed: {TOLERANCES[precisions[name]]:g})"
        for name, deviation in deviations.items()
        if not deviation <= TOLERANCES[precisions[name]]
    ]
    if wrong:
        raise PeerError(
            "the contenders do not compute the same thing: over the first "
            f"{len(reference)} steps the losses deviate from the median for {'; '.join(wrong)}"
        )
    return deviations


def measure_throughput(
    running: Sequence[Any],
    *,
    rounds: int,
    steps: int,
    batch: int,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, list[float]]:
    """Run every contender once a round, in a shuffled order.

    Args:
      running: contenders as pool.Running has them.
      rounds: how many.
      steps: timed in each round.
      batch: examples in a global batch.
      seed: of the orders.
      say: told of each round.

    Returns:
      Images per second of each contender in each round.
    """
    order = random.Random(seed)
    rates: dict[str, list[float]] = {each.contender.name: [] for each in running}
    for number in range(1, rounds + 1):
        for each in order.sample(running, len(running)):
            each.run(WARM_STEPS)
            seconds, _ = each.run(steps)
            rates[each.contender.name].append(batch * steps / seconds)
        say(f"round {number} of {rounds}")
    return rates


def list_ratios(
    rates: Mapping[str, Sequence[float]], ours: Sequence[str]
) -> dict[str, dict[str, Ratio]]:
    """Return {our contender: {other: ratio}}, each ratio taken within a round.

    Args:
      rates: images per second of each contender in each round.
      ours: names of contenders to compare with all that are not among them.

    Returns:
      Median and spread over the rounds.
    """

    def median_ratio(own: str, other: str) -> Ratio:
        each = [a / b for a, b in zip(rates[own], rates[other], strict=True)]
        return Ratio(statistics.median(each), min(each), max(each))

    others = [name for name in rates if name not in ours]
    return {
        own: {other: median_ratio(own, other) for other in others} for own in ours if own in rates
    }
