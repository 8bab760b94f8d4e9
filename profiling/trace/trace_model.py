"""What a trace says, as data."""

from collections.abc import Mapping
from dataclasses import dataclass

from txcore.profiling.trace.figures import CollectiveTime, OperationTime
from txcore.profiling.trace.join import Joined
from txcore.profiling.trace.model import Work
from txcore.profiling.trace.steps import Step
from txcore.profiling.trace.stragglers import Straggler


@dataclass(frozen=True)
class TraceModel:
    """What a trace says; all times in nanoseconds.

    Attributes:
      platform: "cpu" or "gpu".
      devices: (rank, place) of each device that has events.
      program: the module whose runs are the steps.
      collectives: what each took, the longest first.
      operations: what each other operation took, the longest first.
      steps: of each device.
      stragglers: the devices that others wait for.
      events: all of them, on one clock, by start.
      work: each rank's host work, on the same clock.
      waiting: by (rank, device, start) of a collective how long it waited for others.
      joined: how many events have an instruction, of how many.
      checked: whether all programs with collectives were compared with their traced ones.
      notes: what is missing, cut off or guessed.
    """

    platform: str
    devices: tuple[tuple[int, int], ...]
    program: str
    collectives: tuple[CollectiveTime, ...]
    operations: tuple[OperationTime, ...]
    steps: tuple[Step, ...]
    stragglers: tuple[Straggler, ...]
    events: tuple[Joined, ...]
    work: Mapping[int, tuple[Work, ...]]
    waiting: Mapping[tuple[int, int, int], int]
    joined: tuple[int, int]
    checked: bool
    notes: tuple[str, ...]

    @property
    def undeclared(self) -> tuple[CollectiveTime, ...]:
        """Return the collectives that ran and that nobody asked for, or that no program has."""
        return tuple(c for c in self.collectives if c.calls and not c.row.explained)

    @property
    def ok(self) -> bool:
        """Tell whether every collective that ran was declared."""
        return not self.undeclared
