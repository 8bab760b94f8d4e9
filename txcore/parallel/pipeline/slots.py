"""Slots: which microbatch each stage works on at each tick, as int32 tables."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

IDLE = -1


class Slots(NamedTuple):
    """Hold one kind of work of a schedule, such as all forward passes.

    Attributes:
      microbatch: int32 [ticks, stages], the microbatch that a stage works on at a tick; -1 where
        it is idle.
      chunk: int32 [ticks, stages], which of the stage's chunks of layers does it; -1 as above.
    """

    microbatch: np.ndarray
    chunk: np.ndarray


def make_slots(work: Iterable[tuple[int, int, int, int]], ticks: int, stages: int) -> Slots:
    """Make the tables of work that is listed as (tick, stage, microbatch, chunk)."""
    slots = Slots(*(np.full((ticks, stages), IDLE, np.int32) for _ in Slots._fields))
    for tick, stage, microbatch, chunk in work:
        slots.microbatch[tick, stage] = microbatch
        slots.chunk[tick, stage] = chunk
    return slots


def list_work(slots: Slots) -> list[tuple[int, int, int, int]]:
    """List work as (tick, stage, microbatch, chunk), by tick."""
    ticks, stages = np.nonzero(slots.microbatch != IDLE)
    return [
        (int(t), int(s), int(slots.microbatch[t, s]), int(slots.chunk[t, s]))
        for t, s in zip(ticks, stages, strict=True)
    ]


def find_ticks(slots: Slots, microbatches: int, chunks: int) -> np.ndarray:
    """Return the tick of each piece of work, int [stages, microbatches, chunks]; -1 where none."""
    found = np.full((slots.microbatch.shape[1], microbatches, chunks), IDLE)
    for tick, stage, microbatch, chunk in list_work(slots):
        found[stage, microbatch, chunk] = tick
    return found


def used_ticks(slots: Slots) -> range:
    """Return the ticks from the first to the last at which any stage works."""
    busy = np.flatnonzero((slots.microbatch != IDLE).any(1))
    return range(int(busy[0]), int(busy[-1]) + 1) if busy.size else range(0)


def shift_activations(forward: Slots, chunks: int) -> Slots:
    """Return what each stage receives at each tick: what the stage before it made a tick earlier.

    The last stage sends to the first, which goes on with its next chunk; what its last chunk makes
    is nobody's.
    """
    work = []
    stages = forward.microbatch.shape[1]
    for tick, stage, microbatch, chunk in list_work(forward):
        following, later = (stage + 1) % stages, chunk + (stage == stages - 1)
        if later < chunks:
            work.append((tick + 1, following, microbatch, later))
    return make_slots(work, len(forward.microbatch) + 1, stages)


def shift_cotangents(backward: Slots) -> Slots:
    """Return what each stage receives at each tick on the way back: of the stage after it."""
    work = []
    stages = backward.microbatch.shape[1]
    for tick, stage, microbatch, chunk in list_work(backward):
        before, earlier = (stage - 1) % stages, chunk - (stage == 0)
        if earlier >= 0:
            work.append((tick + 1, before, microbatch, earlier))
    return make_slots(work, len(backward.microbatch) + 1, stages)
