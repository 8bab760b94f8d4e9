"""What a compiled program costs on its machine, which need not be here: bytes, memory, time."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from txcore.profiling.audit import audit_program
from txcore.profiling.bandwidth import bus_factor
from txcore.profiling.cost.machine import Machine, machine_on
from txcore.profiling.cost.memory import Memory, memory_of
from txcore.profiling.cost.replicated import Replicated, replicated
from txcore.profiling.cost.schedule import Overlap, Schedule, schedule
from txcore.profiling.program import Program, compile_for_target, compile_program
from txcore.profiling.report import Collective, Report
from txcore.profiling.targets import parse_target


@dataclass(frozen=True)
class Total:
    """What all collectives of one kind along the same axes send in one call of a program.

    Attributes:
      kind: HLO's name of the collective.
      axes: the mesh axes that it talks along.
      group_size: devices in a group (n).
      calls: executions, loops multiplied.
      payload_bytes: S, as nccl-tests defines it, of all calls.
      wire_bytes: what each device sends: S in the wire dtype times the bus factor.
      bus_factor: see `bandwidth.bus_factor`.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    calls: int
    payload_bytes: int
    wire_bytes: int
    bus_factor: float


@dataclass(frozen=True)
class Costs:
    """What one call of a program costs; print it to read it.

    Attributes:
      report: the audit of its collectives.
      totals: what they send by kind and axes, the most on the wire first.
      memory: bytes on each device; None where the compiler does not say.
      memory_size: what a device of the target has; None where that is not known.
      replicated: arrays that could be sharded, the largest savings first.
      schedule: what hides what, and the predicted time, for the target's peaks.
    """

    report: Report
    totals: tuple[Total, ...]
    memory: Memory | None
    memory_size: int | None
    replicated: tuple[Replicated, ...]
    schedule: Schedule

    def row_of(self, overlap: Overlap) -> Collective | None:
        """Return the report's row of a collective of the schedule; the first of a merged one."""
        return next((c for c in self.report.collectives if c.op == overlap.op), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the costs as plain lists, numbers and strings; times are in seconds."""
        plan = self.schedule
        return {
            "target": self.report.target,
            "mesh": dict(self.report.mesh),
            "totals": [dataclasses.asdict(t) for t in self.totals],
            "memory": None if self.memory is None else dataclasses.asdict(self.memory),
            "memory_size": self.memory_size,
            "replicated": [dataclasses.asdict(r) for r in self.replicated],
            "schedule": {
                "overlaps": [self._overlap_dict(o) for o in plan.overlaps],
                "flops": plan.flops,
                "bytes": plan.bytes,
                "seconds": plan.seconds,
                "compute_seconds": plan.compute_seconds,
                "communication_seconds": plan.communication_seconds,
                "exposed_seconds": plan.exposed_seconds,
                "hidden": plan.hidden,
                "is_exact": plan.is_exact,
            },
        }

    def _overlap_dict(self, overlap: Overlap) -> dict[str, Any]:
        row = self.row_of(overlap)
        names = {"axes": row.axes if row else (), "tags": row.tags if row else ()}
        return {**dataclasses.asdict(overlap), **names, "hidden": overlap.hidden}

    def to_json(self) -> str:
        """Return the costs as canonical JSON: sorted keys, no blanks, so that equal is equal."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def __str__(self) -> str:
        from txcore.profiling.cost.text import lines  # tabulate, which importing must not cost

        return "\n".join(lines(self))


def costs(
    fn: Callable[..., Any],
    *args: Any,
    target: str | None = None,
    mesh: Mapping[str, int] | None = None,
    at_least: int = 1 << 20,
) -> Costs:
    """Compile a function and count what one call of it sends, stores and computes.

    Args:
      fn: any jax function, jitted or not; with `target` a function `build(mesh) -> (fn, args)`.
      *args: its arguments, as for `audit`; none with a target.
      target: a machine to compile for, which need not be here, as for `audit`. Times are
        predicted for a TPU or GPU target alone.
      mesh: the target's axes and their sizes.
      at_least: bytes on each device; arrays that would save less if they were sharded are left
        out.

    Returns:
      The costs. Nothing is executed.

    Raises:
      TypeError: `fn` is not callable, or options do not go together.
      ValueError: no such target, or a mesh that does not fit it.
      ImportError, RuntimeError: the target's compiler is missing or does not work.

    Example:
      >>> found = costs(lambda x: x @ x, jnp.ones((64, 64)))
      >>> found.schedule.flops, found.totals, found.memory.arguments
      (524288, (), 16384)
    """
    if isinstance(fn, jax.stages.Compiled) or not callable(fn):
        raise TypeError(
            f"costs needs a function that is not compiled yet, but got a {type(fn).__name__}: "
            "call costs(fn, *args)"
        )
    if target is None:
        if mesh is not None:
            raise TypeError(
                "costs needs target= with mesh=: call costs(build, target=..., mesh=...), or give "
                "the arguments of costs(fn, *args) shardings on a mesh"
            )
        return costs_of(compile_program(fn, args), at_least=at_least)
    if args:
        raise TypeError(
            "with target= costs needs build(mesh), which returns (fn, args), alone, but got "
            f"{len(args)} arguments more: return them from build"
        )
    return costs_of(compile_for_target(fn, target, mesh), at_least=at_least)


def costs_of(program: Program, *, at_least: int = 1 << 20) -> Costs:
    """Count what one call of a compiled program sends, stores and computes.

    Args:
      program: from `compile_program` or `compile_for_target`.
      at_least: as for `costs`.

    Returns:
      The costs.
    """
    report = audit_program(program)
    machine = _machine(program)
    text = program.compiled.as_text() or ""
    return Costs(
        report=report,
        totals=by_axis(report),
        memory=memory_of(program.compiled),
        memory_size=int(machine.chip.hbm_bytes) if machine is not None else None,
        replicated=replicated(program.compiled, at_least=at_least),
        schedule=schedule(text, machine=machine, devices=len(_devices(program.compiled)) or 1),
    )


def by_axis(report: Report) -> tuple[Total, ...]:
    """Add up what the collectives of a report send, by kind and mesh axes.

    Args:
      report: from an audit.

    Returns:
      The totals, the most on the wire first. What could not be read is left out; the report's
      verdict names it.
    """
    groups: dict[tuple[str, tuple[str, ...], int], list[Collective]] = defaultdict(list)
    for row in report.collectives:
        if row.kind not in ("unknown", "custom-call"):
            groups[row.kind, row.axes, row.group_size].append(row)
    totals = [
        Total(
            kind=kind,
            axes=axes,
            group_size=n,
            # Two rows of one op are one execution of it.
            calls=sum({row.op: row.trips for row in rows}.values()),
            payload_bytes=sum(row.payload_bytes * row.trips for row in rows),
            wire_bytes=sum(row.wire_bytes * row.trips for row in rows),
            bus_factor=float(bus_factor(kind, max(n, 1))),
        )
        for (kind, axes, n), rows in groups.items()
    ]
    return tuple(sorted(totals, key=lambda t: (-t.wire_bytes, t.kind, t.axes)))


def _machine(program: Program) -> Machine | None:
    try:
        target = parse_target(program.target)
    except ValueError:  # compiled for this machine's devices, whose peaks nobody named
        return None
    if target.chip is None:
        return None
    return machine_on(target.chip, _devices(program.compiled) or target.devices)


def _devices(compiled: jax.stages.Compiled) -> tuple[jax.Device, ...]:
    """Return the devices of the largest mesh that a program is on, in its order."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    meshes = [
        s.mesh
        for s in shardings
        if isinstance(s, jax.NamedSharding) and isinstance(s.mesh, jax.sharding.Mesh)
    ]
    largest = max(meshes, key=lambda mesh: mesh.size, default=None)
    return tuple(largest.devices.flat) if largest is not None else ()
