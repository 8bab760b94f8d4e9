"""Schedules of a pipeline as data: which stage does what at which tick, checked when made."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from txcore.parallel.pipeline import drawing
from txcore.parallel.pipeline.slots import IDLE, Slots, find_ticks

KINDS = {"F": "forward", "B": "backward", "W": "weight"}
_Pass = tuple[str, int, int]  # (letter, stage, chunk)


@dataclass(frozen=True, eq=False)
class Schedule:
    """State at which tick each stage works on which microbatch.

    At a tick a stage does at most one forward pass, then at most one backward pass, then at most
    one weight pass; then all stages send to their neighbours what they made, which arrives with
    the next tick. With p stages and v chunks, chunk c of stage s is the virtual stage c * p + s.
    A schedule with weight passes splits the backward pass: `backward` computes the gradient of a
    stage's input, for which the stage before it waits, and `weight` that of its parameters, for
    which nobody does. A schedule that cannot run is refused when it is made.

    Attributes:
      name: what it is called.
      microbatches: m, how many parts the batch is split into.
      chunks: v, how many chunks of layers each stage holds.
      forward: forward passes.
      backward: backward passes.
      weight: weight passes; idle throughout where backward passes are whole.

    Raises:
      ValueError: the tables differ in shape, miss or repeat work, or use what has not arrived yet.

    Example:
      >>> print(tx.pipeline.make_schedule("1f1b", stages=2, microbatches=3))
      1f1b: 2 stages, 3 microbatches, 5 ticks, bubble 1/4
      device 0  F0 F1 .  F2 B0 .  B1 B2
      device 1  .  F0 B0 F1 B1 F2 B2 .
    """

    name: str
    microbatches: int
    chunks: int
    forward: Slots
    backward: Slots
    weight: Slots

    def __post_init__(self) -> None:
        _check_tables(self)
        _check_complete(self)
        _check_order(self)

    @property
    def stages(self) -> int:
        """The number of stages, p."""
        return int(self.forward.microbatch.shape[1])

    @property
    def ticks(self) -> int:
        """The number of ticks, T."""
        return len(self.forward.microbatch)

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients have passes of their own."""
        return bool((self.weight.microbatch != IDLE).any())

    def count_time(self, forward: int = 1, backward: int = 1, weight: int = 1) -> int:
        """Add up the ticks' times: a tick takes as long as its busiest stage.

        Args:
          forward: time of a forward pass of one chunk.
          backward: time of the gradient of its input.
          weight: time of the gradient of its parameters; a whole backward pass takes both.

        Returns:
          The time, in the same unit.

        Example:
          >>> tx.pipeline.make_schedule("zb-h1", stages=4, microbatches=8).count_time()
          27
        """
        whole = backward if self.splits_backward else backward + weight
        work = ((self.forward, forward), (self.backward, whole), (self.weight, weight))
        busy = sum((slots.microbatch != IDLE) * time for slots, time in work)
        return int(np.max(busy, 1).sum())

    def find_bubble(self, forward: int = 1, backward: int = 1, weight: int = 1) -> Fraction:
        """Return which part of the time a stage waits.

        Equation: `1 - m v (forward + backward + weight) / count_time`. That is
        (p - 1) / (m + p - 1) for GPipe and 1F1B, (p - 1) / (v m + p - 1) for interleaved 1F1B with
        m a multiple of p, and, where the three take the same time and m >= p,
        (p - 1) / (3 m + p - 1) for ZB-H1.

        Args:
          forward: as for `count_time`.
          backward: as for `count_time`.
          weight: as for `count_time`.

        Returns:
          The exact fraction.

        Example:
          >>> tx.pipeline.make_schedule("1f1b", stages=4, microbatches=8).find_bubble()
          Fraction(3, 11)
        """
        needed = self.microbatches * self.chunks * (forward + backward + weight)
        return 1 - Fraction(needed, self.count_time(forward, backward, weight))

    def to_svg(self) -> str:
        """Draw the schedule as the papers do: a row a device, time to the right; returns SVG.

        Example:
          >>> tx.pipeline.make_schedule("gpipe", stages=2, microbatches=2).to_svg()[:4]
          '<svg'
        """
        lengths = (1, 1 if self.splits_backward else 2, 1)
        return drawing.draw_svg(self._label, self.forward, self.backward, self.weight, lengths)

    def __str__(self) -> str:
        rows = drawing.draw_text(self._label, self.forward, self.backward, self.weight)
        chunks = f" of {self.chunks} chunks" if self.chunks > 1 else ""
        head = (
            f"{self.name}: {self.stages} stages{chunks}, {self.microbatches} microbatches, "
            f"{self.ticks} ticks, bubble {self.find_bubble()}"
        )
        return "\n".join([head, *rows])

    def _repr_html_(self) -> str:
        return f"{self.to_svg()}<pre>{html.escape(str(self))}</pre>"

    def _label(self, kind: str, microbatch: int, chunk: int) -> str:
        return f"{kind}{microbatch}" + (f".{chunk}" if self.chunks > 1 else "")


def _list_slots(schedule: Schedule) -> Iterator[tuple[str, str, Slots]]:
    """Go over (letter, field, slots), the weight passes only where there are any."""
    for letter, name in KINDS.items():
        slots = getattr(schedule, name)
        if letter != "W" or schedule.splits_backward:
            yield letter, name, slots


def _check_tables(schedule: Schedule) -> None:
    shape = schedule.forward.microbatch.shape
    for name in KINDS.values():
        slots = getattr(schedule, name)
        for field, table in zip(Slots._fields, slots, strict=True):
            if table.shape != shape or table.ndim != 2 or table.dtype != np.int32:
                raise ValueError(
                    f"a Schedule needs int32 tables of one shape (ticks, stages), got "
                    f"{table.dtype} {table.shape} for {name}.{field} and {shape} for "
                    "forward.microbatch"
                )
        busy = slots.microbatch != IDLE
        bounds = (schedule.microbatches, schedule.chunks)
        for field, table, bound in zip(Slots._fields, slots, bounds, strict=True):
            if not ((table[busy] >= 0) & (table[busy] < bound)).all():
                raise ValueError(
                    f"a Schedule of {schedule.microbatches} microbatches and {schedule.chunks} "
                    f"chunks needs {name}.{field} from 0 to {bound - 1}, or -1 where a stage is "
                    f"idle, got {int(table[busy].min())} to {int(table[busy].max())}"
                )


def _check_complete(schedule: Schedule) -> None:
    """Refuse a schedule in which a stage does a piece of work not at all, or twice."""
    for letter, name, slots in _list_slots(schedule):
        count = np.zeros((schedule.stages, schedule.microbatches, schedule.chunks), int)
        busy = slots.microbatch != IDLE
        stage = np.broadcast_to(np.arange(schedule.stages), busy.shape)
        np.add.at(count, (stage[busy], slots.microbatch[busy], slots.chunk[busy]), 1)
        if (count != 1).any():
            s, m, c = (int(i) for i in np.argwhere(count != 1)[0])
            raise ValueError(
                f"a Schedule needs each piece of work once, got {schedule._label(letter, m, c)} "
                f"{count[s, m, c]} times on device {s} in {name}"
            )


def _check_order(schedule: Schedule) -> None:
    """Refuse a schedule in which anything is used before it is there: it would be read as zeros."""
    sizes = (schedule.microbatches, schedule.chunks)
    ticks = {letter: find_ticks(slots, *sizes) for letter, _, slots in _list_slots(schedule)}
    for k in range(schedule.stages * schedule.chunks):
        for microbatch in range(schedule.microbatches):
            for use, made in _list_uses(schedule, k):
                tick, earliest = (
                    int(ticks[letter][stage, microbatch, chunk])
                    for letter, stage, chunk in (use, made)
                )
                earliest += made[1:] != use[1:]  # from another stage or chunk: a tick later
                if tick < earliest:
                    raise ValueError(
                        f"a Schedule needs {schedule._label(use[0], microbatch, use[2])} of device "
                        f"{use[1]} at tick {earliest} or later, since it uses what "
                        f"{schedule._label(made[0], microbatch, made[2])} of device {made[1]} "
                        f"makes, got tick {tick}"
                    )


def _list_uses(schedule: Schedule, k: int) -> Iterator[tuple[_Pass, _Pass]]:
    """Go over what the passes of virtual stage k use, as (pass, that which makes it)."""

    def name_pass(letter: str, k: int) -> _Pass:
        return letter, k % schedule.stages, k // schedule.stages

    if k > 0:
        yield name_pass("F", k), name_pass("F", k - 1)
    yield name_pass("B", k), name_pass("F", k)
    if k < schedule.stages * schedule.chunks - 1:
        yield name_pass("B", k), name_pass("B", k + 1)
    if schedule.splits_backward:
        yield name_pass("W", k), name_pass("B", k)
