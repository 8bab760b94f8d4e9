"""Make the schedules of the papers: GPipe, 1F1B, interleaved 1F1B, ZB-H1."""

from collections.abc import Iterable, Sequence

from txcore.parallel.pipeline.schedule import Schedule
from txcore.parallel.pipeline.slots import make_slots

NAMES = ("gpipe", "1f1b", "interleaved", "zb-h1")
# (tick, stage, microbatch, chunk)
Work = list[tuple[int, int, int, int]]
# One stage's passes in order: (kind, microbatch), of one chunk.
Order = Sequence[tuple[str, int]]


def make_schedule(name: str, *, stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """Make a schedule by name.

    With p stages, m microbatches and v chunks a stage:

    - "gpipe": all forward passes, then all backward passes. Each stage keeps what m forward
      passes leave for backward. Chunks run one after the other.
    - "1f1b": one forward pass and one backward pass a tick, as soon as there is one:
      T = m + 2p - 2 ticks, and what min(2p - 1, m) forward passes leave.
    - "interleaved": 1F1B of v chunks, each 1/v of a stage. T = m v + p v + p - 2 where p divides
      m, and min(p v + p - 1, m v) chunks' forward passes.
    - "zb-h1": a tick is one pass, of which there are three: forward, gradient of the input,
      gradient of the parameters. The last fills the gaps: T = 2m + max(m, p) + p - 1, and what
      min(p, m) forward passes leave.

    A tick of 1F1B is as long as a forward and a backward pass, and what a stage sends arrives with
    the next one: that is why it keeps up to 2p - 1 microbatches, and not p as in the papers, whose
    devices do not keep step.

    Args:
      name: "gpipe", "1f1b", "interleaved" or "zb-h1".
      stages: p, the number of devices along the pipe axis.
      microbatches: m; any number, also below p.
      chunks: v; above 1 for "interleaved" alone, or "gpipe".

    Returns:
      The schedule, checked.

    Raises:
      ValueError: the name is unknown, a number is below 1, or the schedule has no such chunks.

    Example:
      >>> print(tx.pipeline.make_schedule("zb-h1", stages=2, microbatches=3))
      zb-h1: 2 stages, 3 microbatches, 10 ticks, bubble 1/10
      device 0  F0 F1 .  B0 W0 F2 B1 W1 B2 W2
      device 1  .  F0 B0 F1 B1 W0 F2 B2 W1 W2

    References:
      Huang et al., "GPipe", 2019. Narayanan et al., "Memory-efficient pipeline-parallel DNN
      training", 2021 (PipeDream-Flush, which is 1F1B), and "Efficient large-scale language model
      training on GPU clusters using Megatron-LM", 2021 (interleaved). Qi et al., "Zero bubble
      pipeline parallelism", 2023 (ZB-H1).
    """
    _check_numbers(name, stages, microbatches, chunks)
    if name == "zb-h1":
        orders = [_order_zb_h1(stage, stages, microbatches) for stage in range(stages)]
        return place_orders(name, orders, microbatches)
    slots = _list_slots(stages, microbatches, chunks)
    # The last stage begins with backward passes when it has done its last forward pass, or, in
    # 1F1B, the first of its last chunk.
    delay = slots[-1][0] + stages if name == "gpipe" else stages * chunks - 1
    forward, backward = [], []
    for stage in range(stages):
        for j, microbatch, chunk in slots:
            forward.append((stage + j, stage, microbatch, chunk))
            tick = delay + (stages - 1 - stage) + j
            backward.append((tick, stage, microbatch, chunks - 1 - chunk))
    return _make_schedule(name, microbatches, chunks, forward, backward, [])


def place_orders(name: str, orders: Sequence[Order], microbatches: int) -> Schedule:
    """Make a schedule of passes in a given order, each as soon as what it uses is there.

    Args:
      name: what the schedule is called.
      orders: for each stage its passes, ("F" | "B" | "W", microbatch), one a tick.
      microbatches: m.

    Returns:
      The schedule, of one chunk a stage.

    Raises:
      ValueError: the stages wait for each other (a deadlock), or the schedule is incomplete.

    Example:
      >>> from txcore.parallel.pipeline.making import place_orders
      >>> print(place_orders("mine", [[("F", 0), ("B", 0)]] * 2, microbatches=1))
      mine: 2 stages, 1 microbatches, 4 ticks, bubble 1/2
      device 0  F0 .  .  B0
      device 1  .  F0 B0 .
    """
    done: dict[tuple[str, int, int], int] = {}  # (kind, stage, microbatch): tick
    left = [list(order) for order in orders]
    tick = 0
    while any(left):
        ready = [
            stage
            for stage, order in enumerate(left)
            if order and all(need in done for need in _list_needs(order[0], stage, len(orders)))
        ]
        if not ready:
            first = ((stage, *order[0]) for stage, order in enumerate(left) if order)
            waiting = ", ".join(f"{kind}{j} on device {stage}" for stage, kind, j in first)
            raise ValueError(
                f"the orders of schedule {name!r} end in a deadlock at tick {tick}: waiting are "
                f"{waiting}. A pass needs its microbatch's from the stage before it (F) or after "
                "it (B), and its own stage's F before B before W"
            )
        for stage in ready:
            kind, microbatch = left[stage].pop(0)
            done[kind, stage, microbatch] = tick
        tick += 1
    work: dict[str, Work] = {"F": [], "B": [], "W": []}
    for (kind, stage, microbatch), when in done.items():
        work[kind].append((when, stage, microbatch, 0))
    return _make_schedule(name, microbatches, 1, work["F"], work["B"], work["W"])


def _list_needs(step: tuple[str, int], stage: int, stages: int) -> Iterable[tuple[str, int, int]]:
    kind, microbatch = step
    if kind == "F" and stage > 0:
        yield "F", stage - 1, microbatch
    if kind == "B":
        yield "F", stage, microbatch
        if stage < stages - 1:
            yield "B", stage + 1, microbatch
    if kind == "W":
        yield "B", stage, microbatch


def _list_slots(stages: int, microbatches: int, chunks: int) -> list[tuple[int, int, int]]:
    """List a stage's forward passes as (number of its slot, microbatch, chunk).

    Groups of p microbatches go through chunk after chunk: what leaves the last stage is back at
    the first one in time for the next chunk. One chunk needs no groups.
    """
    if chunks == 1:
        return [(j, j, 0) for j in range(microbatches)]
    found = []
    for j in range(-(-microbatches // stages) * stages * chunks):
        group, rest = divmod(j, stages * chunks)
        chunk, place = divmod(rest, stages)
        if (microbatch := group * stages + place) < microbatches:
            found.append((j, microbatch, chunk))
    return found


def _order_zb_h1(stage: int, stages: int, microbatches: int) -> Order:
    """Order a stage's passes: 1F1B, with weight passes as many microbatches late as its number.

    So each stage holds as many microbatches as the first: those between F and B, and those
    between B and W.
    """
    warm = min(stages - 1 - stage, microbatches)
    order: list[tuple[str, int]] = [("F", j) for j in range(warm)]
    for j in range(microbatches):
        if warm + j < microbatches:
            order.append(("F", warm + j))
        order.append(("B", j))
        if j >= stage:
            order.append(("W", j - stage))
    late = range(max(0, microbatches - stage), microbatches)
    return order + [("W", j) for j in late]


def _make_schedule(
    name: str, microbatches: int, chunks: int, forward: Work, backward: Work, weight: Work
) -> Schedule:
    every = forward + backward + weight
    ticks, stages = (1 + max(work[i] for work in every) for i in (0, 1))
    slots = [make_slots(work, ticks, stages) for work in (forward, backward, weight)]
    return Schedule(name, microbatches, chunks, *slots)


def _check_numbers(name: str, stages: int, microbatches: int, chunks: int) -> None:
    if name not in NAMES:
        raise ValueError(
            f"tx.pipeline.make_schedule needs a name of {', '.join(map(repr, NAMES))}, got {name!r}"
        )
    numbers = {"stages": stages, "microbatches": microbatches, "chunks": chunks}
    for option, number in numbers.items():
        if number < 1:
            raise ValueError(f"tx.pipeline.make_schedule needs {option}= 1 or more, got {number}")
    if name == "interleaved" and chunks == 1:
        raise ValueError(
            "the schedule 'interleaved' needs chunks= 2 or more, got 1: of one chunk a stage it is "
            "'1f1b'"
        )
    if name in ("1f1b", "zb-h1") and chunks > 1:
        raise ValueError(
            f"the schedule {name!r} needs chunks=1, got {chunks}: several chunks a stage are "
            "'interleaved' (1F1B) or 'gpipe'"
        )
