"""What a trace is read into: plain tuples of times, in nanoseconds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from txcore.errors import TxcoreError
from txcore.profiling.hlo import NO_GROUPS, Groups
from txcore.profiling.hlo.read_groups import Pairs


class TraceError(TxcoreError, ValueError):
    """A trace cannot be read: which file, what it needs, what it has, and what to do."""


class Event(NamedTuple):
    """One execution of an operation on one device, on the clock of its process.

    Attributes:
      device: the device's place among those of its process.
      module, op: the HLO module's and instruction's names, as the profiler says.
      run: which execution of the module: the runtime's number, or 0 where the trace has none.
      start, end: nanoseconds.
      latest: when it had ended at the latest, where it may go on after `end` in a pool of threads.
      kernel: the name of what ran; the op's on CPU.
      in_graph: whether it ran in a command buffer (a CUDA graph), where `op` names the buffer.
    """

    device: int
    module: str
    op: str
    run: int
    start: int
    end: int
    latest: int
    kernel: str = ""
    in_graph: bool = False


class Work(NamedTuple):
    """A stretch of the host's time: `what` is "input" or "host"."""

    what: str
    start: int
    end: int


@dataclass(frozen=True)
class Row:
    """One collective of a program as the audit sees it, the origins of a merged one together.

    Attributes:
      op: the HLO instruction.
      kind, origin, tags, axes, group_size, dtype, source: as of a `report.Collective`.
      payload_bytes, wire_bytes: of one execution; 0 where they are not known.
      trips: executions in one call of the program, as the audit counts them.
      trips_known: False where that is the least.
      explained: whether the program declares it, as far as it can be told.
      groups, pairs: the devices that talk to each other, by their place in the program's mesh.
    """

    op: str
    kind: str
    origin: str
    tags: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    group_size: int = 0
    dtype: str = ""
    source: str = ""
    payload_bytes: int = 0
    wire_bytes: int = 0
    trips: int = 1
    trips_known: bool = True
    explained: bool = True
    groups: Groups = NO_GROUPS
    pairs: Pairs = ()


@dataclass(frozen=True)
class Place:
    """Where an instruction of a module comes from.

    Attributes:
      opcode: HLO's.
      op_name: jax's path to the primitive.
      source: "file.py:12", or "".
      collective: the op of the collective that it is, starts, ends or wraps, or "".
      ends: whether it is the second half of a collective, which waits for the first.
    """

    opcode: str
    op_name: str
    source: str
    collective: str = ""
    ends: bool = False


@dataclass(frozen=True)
class Program:
    """A module that ran, with what is known of it.

    Attributes:
      module: its name.
      places: by instruction.
      rows: its collectives, by op.
      checked: whether the traced program was there to compare with, when it was audited.
      devices: the ids of the devices of its mesh, in order; empty where that is not known.
      users: by instruction those that need its result, and have events.
      caller: by instruction the loop or call that runs its computation, if there is just one.
    """

    module: str
    places: Mapping[str, Place]
    rows: Mapping[str, Row]
    checked: bool = False
    devices: tuple[int, ...] = ()
    users: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    caller: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rank:
    """The trace of one process.

    Attributes:
      rank: its number.
      clock: nanoseconds since 1970 at the trace's time 0; 0 where the trace does not say.
      host: what its clock belongs to: the machine's name and when it booted.
      devices: the ids of its devices, in order.
      platform: "cpu" or "gpu".
      events: those of its devices, by start.
      work: its host's.
      programs: those that ran.
      processes: how many the run had; 0 where the trace does not say.
      notes: what is missing or cut off, for people.
    """

    rank: int
    clock: int
    host: str
    devices: tuple[int, ...]
    platform: str
    events: tuple[Event, ...]
    work: tuple[Work, ...] = ()
    programs: tuple[Program, ...] = ()
    processes: int = 0
    notes: tuple[str, ...] = field(default=())
