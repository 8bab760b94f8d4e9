"""Walk the schedule of a compiled program with a clock; `schedule.py` explains the model."""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from txcore.profiling.cost.instruction import count_work
from txcore.profiling.cost.machine import REMOTE_DMA, Machine, Transfer
from txcore.profiling.hlo import KINDS, Computation, HloError, Instruction, Op, attributes
from txcore.profiling.hlo.graph import Call, Graph, Scope, operand_names
from txcore.profiling.hlo.trip_counts import Trips, trips_of

_COPIES = frozenset({"copies"})  # copies to and from on-chip memory wait in line for each other
_RUNS_OTHERS = ("while", "call", "conditional")
# XLA for TPU starts and ends some collectives in fusions, and continues them in one with compute.
_START, _DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
_PASSED_THROUGH = ("get-tuple-element", "tuple", "bitcast", "fusion", "opt-barrier")
# XLA names so what its rematerialisation pass computes a second time.
_REMADE = re.compile(r"\.remat\d*(?:\.|$)")
_MOST_PASSED = 64  # instructions between a start and its done's operand; real ones pass under 8


@dataclass(slots=True)
class Flight:
    """One collective from its start to its done, on the clock of its computation.

    Attributes:
      op: the collective; None for a copy.
      links: the links that it occupies.
      begin, end: when it is on its links; later than its start where they were busy.
      flops, bytes: what the device has done at its start, then between start and done.
      is_async: whether it has a start and a done.
      seconds: its time alone on its links.
      exposed: the part of it in which the device waits.
      trips: executions in one call of the program.
      note: why its figures are not the whole truth.
    """

    op: Op | None
    links: frozenset[str]
    begin: float
    end: float
    flops: int
    bytes: int
    is_async: bool
    seconds: float = 0.0
    exposed: float = 0.0
    trips: int = 1
    note: str = ""


@dataclass(slots=True)
class ComputationRun:
    """One run of a computation: its time, the part of it that is exposed, work, and flights."""

    seconds: float = 0.0
    exposed: float = 0.0
    flops: int = 0
    bytes: int = 0
    remade: int = 0  # of the flops, those that the compiler computes anew to save memory
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flights: list[Flight] = field(default_factory=list)
    is_exact: bool = True


class Timeline:
    """The runs of a module's computations, each walked on first use."""

    def __init__(self, graph: Graph, ops: Sequence[Op], machine: Machine | None):
        self._graph, self._machine = graph, machine
        self._ops: dict[str, dict[str, Op]] = defaultdict(dict)
        for op in ops:
            self._ops[op.computation][op.name] = op
        self._starts, self._dones = (
            _computations_with_call(graph, target) for target in (_START, _DONE)
        )
        self._runs: dict[str, ComputationRun | None] = {}

    def run_computation(self, computation: str) -> ComputationRun:
        """Walk a computation, and all that it runs.

        Raises:
          HloError: it runs itself, or a line of it cannot be read.
        """
        if computation not in self._runs:
            self._runs[computation] = None
            self._runs[computation] = self._walk_computation(computation)
        run = self._runs[computation]
        if run is None:
            raise HloError(f"the computation {computation} runs itself")
        return run

    def _walk_computation(self, computation: str) -> ComputationRun:
        scope = self._graph.scope_of(computation)
        clock = _Clock()
        for instruction in scope.computation.instructions:
            if instruction.opcode in _RUNS_OTHERS:
                clock.run_nested(self._run_nested(instruction, scope))
            elif (start := clock.start_of(instruction, scope)) is not None:
                if self._ends_transfer(instruction):
                    clock.wait_for(start)
                else:  # a fusion that computes while the collective goes on
                    self._run_compute(clock, instruction, scope)
            elif self._ends_transfer(instruction):
                continue  # its start is in another computation, where it is said
            elif ops := self._collectives_of(instruction, computation):
                self._start_collectives(clock, instruction, ops)
            elif instruction.opcode.endswith("-start"):
                work = count_work(instruction, scope, self._graph)
                seconds = self._machine.compute_seconds(work) if self._machine else 0.0
                clock.start_transfer(instruction.name, None, Transfer(seconds, _COPIES))
                clock.add_work(work.total_flops, work.bytes)
            else:
                self._run_compute(clock, instruction, scope)
        return clock.finish_run()

    def _run_compute(self, clock: "_Clock", instruction: Instruction, scope: Scope) -> None:
        work = count_work(instruction, scope, self._graph)
        clock.now += self._machine.compute_seconds(work) if self._machine else 0.0
        clock.add_work(work.total_flops, work.bytes)
        if _REMADE.search(instruction.name):
            clock.total.remade += work.total_flops

    def _start_collectives(
        self, clock: "_Clock", instruction: Instruction, ops: Sequence[Op]
    ) -> None:
        is_async = (
            instruction.opcode.endswith("-start")
            or instruction.opcode == "send"
            or _calls_any(instruction, self._starts)
        )
        for op in ops:
            is_read = op.kind in (*KINDS, "send", REMOTE_DMA)
            transfer = Transfer(0.0, frozenset())
            if is_read and self._machine:
                transfer = self._machine.transfer_of(op)
            flight = clock.start_transfer(instruction.name, op, transfer, is_async)
            if not is_read:
                flight.note = "its bytes are not known: counted as no time"
        if any(op.kind == REMOTE_DMA for op in ops):  # a kernel that computes while it sends
            self._run_compute(clock, instruction, self._graph.scope_of(ops[0].computation))
        if not is_async:
            clock.wait_for(instruction.name)

    def _collectives_of(self, instruction: Instruction, computation: str) -> list[Op]:
        """Return the collectives that an instruction is, or that it starts or runs in a fusion."""
        if (op := self._ops[computation].get(instruction.name)) is not None:
            return [op]
        if not (instruction.opcode == "fusion" or instruction.opcode.endswith("-start")):
            return []
        called = instruction.callees
        found: list[Op] = []
        for name in called:
            if name in self._ops:
                found += self._ops[name].values()
        return found

    def _ends_transfer(self, instruction: Instruction) -> bool:
        return instruction.opcode.endswith("-done") or _calls_any(instruction, self._dones)

    def _run_nested(self, instruction: Instruction, scope: Scope) -> ComputationRun:
        """Return the runs of a loop's, call's or conditional's computations as one."""
        names = [n for n in instruction.callees if n in self._graph.module.computations]
        call = Call(scope.computation.name, "", instruction)
        trips = trips_of(call, self._graph)
        runs = [self.run_computation(name) for name in names]
        if instruction.opcode == "conditional" and runs:
            slowest = max(runs, key=lambda run: (run.seconds, run.flops, run.bytes))
            runs = [slowest, *(_flights_alone(run) for run in runs if run is not slowest)]
        return _add_runs(runs, trips)


def _computations_with_call(graph: Graph, target: str) -> frozenset[str]:
    def has_call(computation: Computation) -> bool:
        calls = (i for i in computation.instructions if i.opcode == "custom-call")
        return any(attributes.custom_call_target(call) == target for call in calls)

    computations = graph.module.computations.items()
    return frozenset(name for name, computation in computations if has_call(computation))


def _calls_any(instruction: Instruction, names: frozenset[str]) -> bool:
    is_fusion = bool(names) and instruction.opcode == "fusion"
    return is_fusion and not names.isdisjoint(instruction.callees)


def _flights_alone(run: ComputationRun) -> ComputationRun:
    note = "in a branch that is not the slowest: not in the predicted time"
    return ComputationRun(flights=[replace(f, note=f.note or note) for f in run.flights])


def _add_runs(runs: Sequence[ComputationRun], trips: Trips) -> ComputationRun:
    busy: dict[str, float] = defaultdict(float)
    for run in runs:
        for link, seconds in run.busy.items():
            busy[link] += trips.count * seconds
    return ComputationRun(
        seconds=trips.count * sum(run.seconds for run in runs),
        exposed=trips.count * sum(run.exposed for run in runs),
        flops=trips.count * sum(run.flops for run in runs),
        bytes=trips.count * sum(run.bytes for run in runs),
        remade=trips.count * sum(run.remade for run in runs),
        busy=busy,
        flights=[replace(f, trips=f.trips * trips.count) for run in runs for f in run.flights],
        is_exact=trips.known and all(run.is_exact for run in runs),
    )


@dataclass(slots=True)
class _Clock:
    """The time in one computation, and what is under way.

    Attributes:
      now: the time.
      free: when each link has finished its queue.
      waits: when the device waited for a collective, from and to.
      under_way: the transfers of each start that has no done yet.
      over: the finished collectives.
      total: the work so far.
    """

    now: float = 0.0
    free: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    waits: list[tuple[float, float]] = field(default_factory=list)
    under_way: dict[str, list[Flight]] = field(default_factory=dict)
    over: list[Flight] = field(default_factory=list)
    total: ComputationRun = field(default_factory=ComputationRun)

    def add_work(self, flops: int, bytes_: int) -> None:
        """Add to the work done so far."""
        self.total.flops += flops
        self.total.bytes += bytes_

    def start_transfer(
        self, name: str, op: Op | None, transfer: Transfer, is_async: bool = True
    ) -> Flight:
        """Put a transfer in line for its links."""
        begin = max((self.now, *(self.free[link] for link in transfer.links)))
        end = begin + transfer.seconds
        work = self.total
        flight = Flight(op, transfer.links, begin, end, work.flops, work.bytes, is_async)
        flight.seconds = transfer.seconds
        for link in transfer.links:
            self.free[link] = end
            work.busy[link] += transfer.seconds
        self.under_way.setdefault(name, []).append(flight)
        return flight

    def wait_for(self, name: str) -> None:
        """Wait for the transfers that `name` started."""
        for flight in self.under_way.pop(name):
            if flight.end > self.now and flight.op is not None:
                self.waits.append((self.now, flight.end))
            self.now = max(self.now, flight.end)
            flight.flops = self.total.flops - flight.flops
            flight.bytes = self.total.bytes - flight.bytes
            if flight.op is not None:
                self.over.append(flight)

    def run_nested(self, inner: ComputationRun) -> None:
        """Add the run of a loop or call; its collectives go before those that are under way."""
        for flight in (f for flights in self.under_way.values() for f in flights):
            taken = max((inner.busy.get(link, 0.0) for link in flight.links), default=0.0)
            if flight.end > self.now:
                flight.begin += taken if flight.begin >= self.now else 0.0
                flight.end += taken
        for link, seconds in inner.busy.items():
            if self.free[link] > self.now:
                self.free[link] += seconds
            self.total.busy[link] += seconds
        self.now += inner.seconds
        self.add_work(inner.flops, inner.bytes)
        self.total.remade += inner.remade
        self.total.exposed += inner.exposed
        self.total.flights += inner.flights
        self.total.is_exact &= inner.is_exact

    def start_of(self, instruction: Instruction, scope: Scope) -> str | None:
        """Return the start under way that an instruction's operands lead back to, or None."""
        if not self.under_way:
            return None
        is_done = instruction.opcode.endswith(("-done", "-update"))
        if not (is_done or instruction.opcode == "fusion"):
            return None
        names, seen = list(operand_names(instruction)), set[str]()
        while names and len(seen) < _MOST_PASSED:
            name = names.pop(0)
            if name in self.under_way:
                return name
            passed = scope.by_name.get(name)
            if name not in seen and passed is not None and passed.opcode in _PASSED_THROUGH:
                seen.add(name)
                names += operand_names(passed)
        return None

    def finish_run(self) -> ComputationRun:
        """Wait for what is still under way, and return the run."""
        for name in list(self.under_way):
            for flight in self.under_way[name]:
                flight.note = "its done is in another computation: counted as exposed"
            self.wait_for(name)
        starts = [start for start, _ in self.waits]
        waited = [0.0]
        for start, end in self.waits:
            waited.append(waited[-1] + end - start)

        def waited_before(time: float) -> float:
            place = bisect_right(starts, time)
            beyond = max(0.0, self.waits[place - 1][1] - time) if place else 0.0
            return waited[place] - beyond

        for flight in self.over:
            # Sums of the same times in another order differ in the last digits.
            exposed = waited_before(flight.end) - waited_before(flight.begin)
            flight.exposed = min(max(exposed, 0.0), flight.seconds)
        self.total.flights = [*self.over, *self.total.flights]
        self.total.seconds = self.now
        self.total.exposed += waited[-1]
        return self.total
