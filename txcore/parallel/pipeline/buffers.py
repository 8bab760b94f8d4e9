"""Buffers of a pipeline: in which slot each value waits from the tick that it comes to its use."""

from dataclasses import dataclass

import numpy as np

from txcore.parallel.pipeline.schedule import Schedule
from txcore.parallel.pipeline.slots import (
    IDLE,
    Slots,
    find_ticks,
    list_work,
    make_slots,
    shift_activations,
    shift_cotangents,
)


@dataclass(frozen=True, eq=False)
class Buffer:
    """Hold the slots of one buffer.

    Attributes:
      size: the number of slots on each device.
      slot: int32 [stages, microbatches, chunks], the slot of each value; -1 for none.
    """

    size: int
    slot: np.ndarray

    def look_up(self, slots: Slots) -> np.ndarray:
        """Return the slot of the value that each stage works on at each tick; -1 where idle."""
        stage = np.broadcast_to(np.arange(len(self.slot)), slots.microbatch.shape)
        found = self.slot[stage, slots.microbatch, slots.chunk]
        return np.where(slots.microbatch == IDLE, IDLE, found).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Buffers:
    """Hold the buffers that a schedule needs, each no larger than what is alive at one tick.

    Attributes:
      activations: what comes from the stage before, until its forward pass.
      stash: what a forward pass leaves for the backward pass (and the weight pass).
      cotangents: what comes from the stage after (at the last one from the loss), until its
        backward pass.
      held: what a backward pass leaves for the weight pass.
    """

    activations: Buffer
    stash: Buffer
    cotangents: Buffer
    held: Buffer


def plan_buffers(schedule: Schedule) -> Buffers:
    """Give each value of a schedule a slot, by greedy colouring of the times that it is alive.

    Example:
      >>> from txcore.parallel.pipeline.buffers import plan_buffers
      >>> for name in ("gpipe", "1f1b", "zb-h1"):
      ...     made = tx.pipeline.make_schedule(name, stages=4, microbatches=16)
      ...     print(name, plan_buffers(made).stash.size)
      gpipe 16
      1f1b 7
      zb-h1 4
    """
    sizes = (schedule.microbatches, schedule.chunks)
    forward, backward, weight = (
        find_ticks(slots, *sizes)
        for slots in (schedule.forward, schedule.backward, schedule.weight)
    )
    activations = find_ticks(shift_activations(schedule.forward, schedule.chunks), *sizes)
    cotangents = find_ticks(shift_cotangents(schedule.backward), *sizes)
    cotangents[-1, :, -1] = forward[-1, :, -1]  # the loss follows the last forward pass
    last = weight if schedule.splits_backward else backward
    return Buffers(
        activations=color_intervals(activations, forward),
        stash=color_intervals(forward, last),
        cotangents=color_intervals(cotangents, backward),
        held=color_intervals(np.where(weight == IDLE, IDLE, backward), weight),
    )


def color_intervals(start: np.ndarray, stop: np.ndarray) -> Buffer:
    """Give values that are alive from tick `start` to tick `stop` slots, none shared in that time.

    Args:
      start: int [stages, microbatches, chunks]; -1 for no value.
      stop: the same; its tick counts.
    """
    slot = np.full(start.shape, IDLE, np.int32)
    for stage in range(len(start)):
        free_after: list[int] = []  # for each slot the last tick at which it is taken
        values = [v for v in np.ndindex(start.shape[1:]) if start[(stage, *v)] != IDLE]
        for value in sorted(values, key=lambda v: start[(stage, *v)]):
            begin, end = start[(stage, *value)], stop[(stage, *value)]
            free = [i for i, taken in enumerate(free_after) if taken < begin]
            chosen = free[0] if free else len(free_after)
            free_after[chosen : chosen + 1] = [end]
            slot[(stage, *value)] = chosen
    return Buffer(max(1, int(np.max(slot)) + 1), slot)


def check_buffers(schedule: Schedule, buffers: Buffers) -> None:
    """Play a schedule with names for values; refuse buffers in which one is overwritten too early.

    Raises:
      ValueError: a pass would read another value than its own, or a slot that does not exist.
    """
    arrived = shift_activations(schedule.forward, schedule.chunks)
    returned = shift_cotangents(schedule.backward)
    # In the order of a tick: (what it says, buffer, whether it writes, of which work).
    steps = [
        ("activations", buffers.activations, True, arrived),
        ("cotangents", buffers.cotangents, True, returned),
        ("activations", buffers.activations, False, schedule.forward),
        ("stash", buffers.stash, True, schedule.forward),
        ("cotangents", buffers.cotangents, True, _pick_last(schedule)),
        ("cotangents", buffers.cotangents, False, schedule.backward),
        ("stash", buffers.stash, False, schedule.backward),
        ("held", buffers.held, True, schedule.backward if schedule.splits_backward else None),
        ("held", buffers.held, False, schedule.weight),
        ("stash", buffers.stash, False, schedule.weight),
    ]
    work = [
        (tick, order, stage, (microbatch, chunk))
        for order, step in enumerate(steps)
        if step[3] is not None
        for tick, stage, microbatch, chunk in list_work(step[3])
    ]
    contents: dict[tuple[str, int, int], tuple[int, int]] = {}
    for tick, order, stage, value in sorted(work):
        name, buffer, writes, _ = steps[order]
        slot = int(buffer.slot[(stage, *value)])
        if slot == IDLE and not writes and name != "stash":
            continue  # the first stage's input comes from nobody
        if not 0 <= slot < buffer.size:
            raise ValueError(
                f"buffer {name!r} needs slots from 0 to {buffer.size - 1}, got {slot} for "
                f"microbatch {value[0]}, chunk {value[1]} on device {stage}"
            )
        place = (name, stage, slot)
        if writes:
            contents[place] = value
        elif contents.get(place) != value:
            raise ValueError(
                f"buffer {name!r} needs one slot for each value that is alive, but slot {slot} of "
                f"device {stage} holds {contents.get(place)} at tick {tick}, where (microbatch, "
                f"chunk) {value} is read: it is overwritten too early"
            )


def _pick_last(schedule: Schedule) -> Slots:
    """Return the forward passes of the last virtual stage, after which the loss is taken."""
    work = list_work(schedule.forward)
    final = (schedule.stages - 1, schedule.chunks - 1)
    kept = [one for one in work if (one[1], one[3]) == final]
    return make_slots(kept, schedule.ticks, schedule.stages)
