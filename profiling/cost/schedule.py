"""Predict from a compiled program's schedule how much of its communication compute hides.

The instructions of a scheduled module run in the printed order. A walk through it keeps a clock:
compute takes the roofline's time; an asynchronous collective begins when its links are free, and
its done waits for the rest of it. So no compute is counted as hiding two collectives on one
link. Loops are walked once and multiplied; of a conditional the slowest branch counts.

The prediction is for a machine at its peaks. It ignores contention for memory, the launch of
kernels, caches, waiting for slower devices, overlap from one trip of a loop to the next, and
runtimes that leave the compiler's order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from txcore.profiling.bandwidth import wire_bytes
from txcore.profiling.cost.machine import REMOTE_DMA, Machine
from txcore.profiling.cost.timeline import Flight, Timeline
from txcore.profiling.hlo import Groups, HloError, Input, Op, Shape, find_collectives, read_modules
from txcore.profiling.hlo.graph import Graph


@dataclass(frozen=True)
class Overlap:
    """One collective of the schedule. Figures are of one execution.

    Attributes:
      op: the HLO instruction's name.
      kind: HLO's name of the collective.
      wire_bytes: what each device sends.
      trips: executions in one call of the program.
      is_async: whether it has a start and a done, with other instructions between them or not.
      flops: of matrix products and convolutions between start and done.
      bytes: of main memory moved between start and done.
      seconds: its time alone on its links; None where the machine is not known, as the next.
      exposed_seconds: the part of them in which the device does nothing else.
      note: what is not known of it.
    """

    op: str
    kind: str
    wire_bytes: int
    trips: int
    is_async: bool
    flops: int
    bytes: int
    seconds: float | None
    exposed_seconds: float | None
    note: str = ""

    @property
    def hidden(self) -> float | None:
        """Return the fraction of its time in which the device computes; None if not known."""
        if self.seconds is None or self.exposed_seconds is None:
            return None
        return 1 - self.exposed_seconds / self.seconds if self.seconds else 1.0


@dataclass(frozen=True)
class Schedule:
    """What one call of a program does on one device, and how long that takes at least.

    Attributes:
      overlaps: its collectives.
      flops: of matrix products and convolutions.
      bytes: of main memory moved by all but collectives.
      compute_seconds: the time of everything but waiting for collectives; None where the machine
        is not known, as the next.
      exposed_seconds: the time of waiting for collectives; not the sum of the rows' where several
        are waited for together.
      remade_flops: of the FLOPs, those that XLA computes anew, since memory was short; what the
        program's author rematerialises (`jax.checkpoint`) is not in it.
      is_exact: False where a loop's trips are not known: then all figures are the least.
    """

    overlaps: tuple[Overlap, ...]
    flops: int
    bytes: int
    compute_seconds: float | None
    exposed_seconds: float | None
    is_exact: bool = True
    remade_flops: int = 0

    @property
    def seconds(self) -> float | None:
        """Return the predicted time of one call: compute and the communication not hidden."""
        if self.compute_seconds is None or self.exposed_seconds is None:
            return None
        return self.compute_seconds + self.exposed_seconds

    @property
    def communication_seconds(self) -> float | None:
        """Return the time of all collectives, each alone on its links."""
        times = [o.seconds * o.trips for o in self.overlaps if o.seconds is not None]
        return None if self.compute_seconds is None else sum(times)

    @property
    def hidden(self) -> float | None:
        """Return the fraction of the communication that is hidden; None if not known."""
        whole, exposed = self.communication_seconds, self.exposed_seconds
        if whole is None or exposed is None:
            return None
        return max(0.0, 1 - exposed / whole) if whole else 1.0


Sends = Mapping[str, tuple[int, Groups]]  # by a custom call's name: bytes of a device, the rings


def schedule(
    hlo: str,
    *,
    machine: Machine | None = None,
    devices: int | None = None,
    sends: Sends | None = None,
) -> Schedule:
    """Predict a step from the text of its compiled program.

    Args:
      hlo: one optimized, scheduled module: `compiled.as_text()`.
      machine: what it runs on; without it the schedule has no seconds.
      devices: how many devices the program runs on, where the text's header does not say.
      sends: what custom calls send by remote DMA, which the text does not tell: for each the bytes
        that a device sends, and the rings. A custom call that is not among them takes no time.

    Returns:
      The schedule: totals, and a row for each collective.

    Raises:
      ValueError: it is not the text of one scheduled module (HloError: a line of it cannot be
        read).

    Example:
      >>> found = schedule(
      ...     "HloModule m, is_scheduled=true\\nENTRY %e (x: f32[8,4]) -> f32[8,8] {\\n"
      ...     "  %x = f32[8,4]{1,0} parameter(0)\\n  ROOT %d = f32[8,8]{1,0} dot(%x, %x), "
      ...     "lhs_contracting_dims={1}, rhs_contracting_dims={1}\\n}\\n"
      ... )
      >>> found.flops, found.bytes, found.seconds
      (512, 384, None)
    """
    modules = read_modules(hlo)
    if len(modules) != 1:
        raise ValueError(
            f"schedule needs the text of one HLO module, but got {len(modules)}: pass "
            "compiled.as_text()"
        )
    header = next((line for line in hlo.splitlines() if line.startswith("HloModule")), "")
    if "is_scheduled=true" not in header:
        raise ValueError(
            "schedule needs a scheduled module, whose header says is_scheduled=true, but got "
            f"{header[:60]!r}: pass compiled.as_text() or the last of XLA's dumps"
        )
    ops = [_complete(op, sends or {}) for op in find_collectives(hlo, devices=devices)]
    timeline = Timeline(Graph(modules[0]), ops, machine)
    computations = modules[0].computations.values()
    entry = next((c.name for c in computations if c.is_entry), None)
    if entry is None:
        raise ValueError(
            f"schedule needs a module with an ENTRY computation, but {modules[0].name} has none: "
            "pass the whole text"
        )
    try:
        run = timeline.run_computation(entry)
    except RecursionError:
        raise HloError("a computation runs itself: the text is damaged") from None
    is_timed = machine is not None
    return Schedule(
        overlaps=tuple(_overlap_of_flight(flight, is_timed) for flight in run.flights),
        flops=run.flops,
        bytes=run.bytes,
        compute_seconds=run.seconds - run.exposed if is_timed else None,
        exposed_seconds=run.exposed if is_timed else None,
        is_exact=run.is_exact,
        remade_flops=run.remade,
    )


def _complete(op: Op, sends: Sends) -> Op:
    """Return an op with what its kernel sends, where that is known."""
    if op.kind != "custom-call" or op.name not in sends:
        return op
    sent, groups = sends[op.name]
    operand = Input(Shape("uint8", (sent,), 8))
    return replace(op, kind=REMOTE_DMA, inputs=(operand,), groups=groups, problem="")


def _overlap_of_flight(flight: Flight, is_timed: bool) -> Overlap:
    op = flight.op
    assert op is not None  # copies are not among a run's flights
    return Overlap(
        op=op.name,
        kind=op.kind,
        wire_bytes=wire_bytes(op.kind, max(op.group_size, 1), op.bytes),
        trips=flight.trips,
        is_async=flight.is_async,
        flops=flight.flops,
        bytes=flight.bytes,
        seconds=flight.seconds if is_timed else None,
        exposed_seconds=flight.exposed if is_timed else None,
        note=flight.note or op.problem,
    )
