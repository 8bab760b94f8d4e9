"""Count what a program costs on its machine, which may be absent: bytes, memory, time."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from txcore.profiling import meshes
from txcore.profiling.audit import audit_program
from txcore.profiling.cost.machine import REMOTE_DMA, Machine, machine_on
from txcore.profiling.cost.memory import memory_of
from txcore.profiling.cost.model import CostModel, total_by_axis
from txcore.profiling.cost.replicated import replicated
from txcore.profiling.cost.schedule import Sends, schedule
from txcore.profiling.program import Program, compile_for_target, compile_program
from txcore.profiling.report import Report
from txcore.profiling.targets import parse_target


class Costs(CostModel):
    """What one call of a program costs; print it to read it. See `CostModel` for its fields."""

    def __str__(self) -> str:
        from txcore.profiling.cost.text import (
            write_lines,  # tabulate, which importing must not cost
        )

        return "\n".join(write_lines(self))

    def _repr_html_(self) -> str:
        from txcore.profiling.report.html.notebook import write_lines

        return write_lines(f"{self}\n\n{self.report.verdict()}")


def costs(
    fn: Callable[..., Any],
    *args: Any,
    target: str | None = None,
    mesh: Mapping[str, int] | None = None,
    at_least: int = 1 << 20,
) -> Costs:
    """Compile a function and count the bytes, memory and FLOPs of one call of it.

    Args:
      fn: any jax function, jitted or not; with `target` a function `build(mesh) -> (fn, args)`.
      *args: its arguments, as for `audit`; none with a target.
      target: a machine to compile for, which may be absent, as for `audit`. Only TPU and GPU
        targets have predicted times.
      mesh: the target's axes and their sizes.
      at_least: bytes on each device; `replicated` leaves out arrays that would save less by
        sharding.

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
    """Count the bytes, memory and FLOPs of one call of a compiled program.

    Args:
      program: from `compile_program` or `compile_for_target`.
      at_least: as for `costs`.

    Returns:
      The costs.
    """
    report = audit_program(program)
    machine = _machine_of(program)
    text = program.compiled.as_text() or ""
    return Costs(
        report=report,
        totals=total_by_axis(report),
        memory=memory_of(program.compiled),
        memory_size=int(machine.chip.hbm_bytes) if machine is not None else None,
        replicated=replicated(program.compiled, at_least=at_least),
        schedule=schedule(
            text,
            machine=machine,
            devices=len(_devices_of_largest_mesh(program.compiled)) or 1,
            sends=_sends_of(report),
        ),
    )


def _sends_of(report: Report) -> Sends:
    """Return what a program's kernels send by remote DMA, as the audit found it."""
    return {
        row.op: (row.wire_bytes, meshes.device_groups(tuple(report.mesh), row.axes))
        for row in report.collectives
        if row.kind == REMOTE_DMA
    }


def _machine_of(program: Program) -> Machine | None:
    try:
        target = parse_target(program.target)
    except ValueError:  # compiled for this machine's devices, whose peaks are not known
        return None
    if target.chip is None:
        return None
    return machine_on(target.chip, _devices_of_largest_mesh(program.compiled) or target.devices)


def _devices_of_largest_mesh(compiled: jax.stages.Compiled) -> tuple[jax.Device, ...]:
    """Return the devices of the largest mesh that a program is on, in its order."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    meshes = [
        s.mesh
        for s in shardings
        if isinstance(s, jax.NamedSharding) and isinstance(s.mesh, jax.sharding.Mesh)
    ]
    largest = max(meshes, key=lambda mesh: mesh.size, default=None)
    return tuple(largest.devices.flat) if largest is not None else ()
