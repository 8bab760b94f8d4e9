"""Name the devices that others wait for: against the others, and against their own past."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from txcore.profiling.trace.steps import Step
from txcore.profiling.trace.waits import Device

_CAUSES: dict[str, Callable[[Step], int]] = {
    "compute": lambda step: step.compute,
    "moving": lambda step: max(0, step.exposed - step.waiting),
    "input": lambda step: step.input,
    "host": lambda step: step.host,
    "idle": lambda step: step.idle,
}
SHARE = 0.1  # of a step: less is not worth a name
_LEAST = 50_000  # nanoseconds: less is how threads are woken
_OVER_NOISE = 3.0  # times the usual distance from the median
_LEAST_PAST = 3  # steps, to call one unusual


class Straggler(NamedTuple):
    """A device that does more work of its own than it should, in nanoseconds a step.

    Attributes:
      rank, device: which; device -1 where all devices of the rank do.
      against: "others", whose own work takes `usual` ns where its takes `own`; or "its past": then
        `step` is the one that took `own`, and its other steps take `usual`.
      own, usual: see there.
      step: -1 where it is every step.
      cause: the part of its steps that is the most above the usual: "compute", "moving" (its
        collectives, once all have arrived), "input", "host" or "idle".
    """

    rank: int
    device: int
    against: str
    own: int
    usual: int
    step: int = -1
    cause: str = ""


def find_stragglers(steps: Sequence[Step]) -> tuple[Straggler, ...]:
    """Find stragglers by the part of each step that is not waiting for others.

    Against the others: the median of its steps is longer than the median of the other devices',
    by a tenth of a step (and 50 us) and by three times what it varies. Against its own past: one
    step is longer than the median of its others by half of that and a tenth of a step, and the
    other devices did not do the same in that step.

    Args:
      steps: of all devices.

    Returns:
      The stragglers, those against the others first.
    """
    own: dict[Device, dict[int, int]] = defaultdict(dict)
    took: dict[int, int] = {}
    for step in steps:
        own[step.rank, step.device][step.number] = step.own
        took[step.number] = max(took.get(step.number, 0), step.end - step.start)
    if not own:
        return ()
    least = max(_LEAST, SHARE * statistics.median(took.values()))
    always = _compare_devices(own, least)
    slow = {(s.rank, s.device) for s in always} | {(s.rank, -1) for s in always if s.device < 0}
    once = [
        straggler
        for device, mine in own.items()
        if device not in slow and (device[0], -1) not in slow
        for straggler in _compare_past(device, mine, own, least)
    ]
    found = (*_merge_ranks(always, own), *_merge_ranks(once, own))
    return tuple(straggler._replace(cause=_find_cause(straggler, steps)) for straggler in found)


def _find_cause(straggler: Straggler, steps: Sequence[Step]) -> str:
    """Return the part whose median is the most above that of the steps it is compared with."""
    mine = [
        step
        for step in steps
        if step.rank == straggler.rank and straggler.device in (-1, step.device)
    ]
    if straggler.against == "others":
        usual = [step for step in steps if step not in mine]
    else:
        usual = [step for step in mine if step.number != straggler.step]
        mine = [step for step in mine if step.number == straggler.step]
    excess = {
        name: statistics.median(map(take, mine)) - statistics.median(map(take, usual))
        for name, take in _CAUSES.items()
    }
    return max(excess, key=lambda name: excess[name])


def _compare_devices(own: dict[Device, dict[int, int]], least: float) -> list[Straggler]:
    typical = {device: statistics.median(mine.values()) for device, mine in own.items()}
    found = []
    for device, mine in own.items():
        others = [typical[other] for other in typical if other != device]
        if not others:
            continue
        usual = statistics.median(others)
        noise = statistics.median(abs(each - typical[device]) for each in mine.values())
        if typical[device] - usual > max(least, _OVER_NOISE * noise):
            found.append(Straggler(*device, "others", round(typical[device]), round(usual)))
    return found


def _compare_past(
    device: Device, mine: dict[int, int], own: dict[Device, dict[int, int]], least: float
) -> list[Straggler]:
    found = []
    for number, took in mine.items():
        rest = [value for other, value in mine.items() if other != number]
        if len(rest) < _LEAST_PAST:
            continue
        usual = statistics.median(rest)
        noise = statistics.median(abs(value - usual) for value in rest)
        others = [
            theirs[number] for key, theirs in own.items() if key != device and number in theirs
        ]
        with_them = statistics.median(others) if others else 0
        over = took - max(usual, with_them)
        if over > max(least, usual / 2, _OVER_NOISE * noise):
            found.append(Straggler(*device, "its past", took, round(usual), number))
    return found


def _merge_ranks(found: Sequence[Straggler], own: dict[Device, dict[int, int]]) -> list[Straggler]:
    """Name a rank once where all of its devices are slow alike: what they share is the process."""
    devices: dict[int, int] = defaultdict(int)
    for rank, _ in own:
        devices[rank] += 1
    alike: dict[tuple[int, str, int], list[Straggler]] = defaultdict(list)
    for each in found:
        alike[each.rank, each.against, each.step].append(each)
    merged = []
    for (rank, _, _), same in alike.items():
        if len(same) == devices[rank]:
            worst = max(same, key=lambda s: s.own)
            merged.append(worst._replace(device=-1))
        else:
            merged += same
    return merged
