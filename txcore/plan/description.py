"""A description of a plan: what it is, and its faces for people."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from jax.sharding import PartitionSpec as P

from txcore.layout import axes_of, entry_axes
from txcore.parallel.predicted import Predicted
from txcore.plan.drawing import Held, draw_mesh


@dataclass(frozen=True)
class ParameterRow:
    """State how one parameter lies on the mesh.

    Attributes:
      path: its keys with slashes between them.
      dtype: jax's name of the dtype.
      shape: of all of it, as it is stored.
      spec: which axes split which dim of it; of axes of more than one device.
      part: the shape of what one device stores.
      gradient: what becomes of its gradient: "mean over data".
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    spec: P
    part: tuple[int, ...]
    gradient: str


@dataclass(frozen=True)
class Description:
    """What a plan makes of a model and a mesh: `str` prints it, a notebook draws it.

    Attributes:
      plan: the plan, as it is written.
      sizes: the devices along each axis of the mesh.
      device: what kind they are.
      parameters: a row for each.
      collectives: what the plan makes a step send (`Plan.predict`); the layers' own come on top.
      memory: bytes on one device: of "parameters", of "optimizer state" and of "communication
        state", as they lie between steps; of "gradients" when a step has all of them; and what
        waits in a pipeline: the "pipeline's messages", and its "pipeline's inputs", all that it
        keeps of forward passes where the layers are under `jax.checkpoint`.
      schedule: the pipeline's, in one line; "" without one.
      bubble: the part of the time that a stage waits; None without a pipeline.
      held: what each device has, for the drawing, in the order of the mesh.
    """

    plan: str
    sizes: Mapping[str, int]
    device: str
    parameters: tuple[ParameterRow, ...]
    collectives: tuple[Predicted, ...]
    memory: Mapping[str, int]
    schedule: str
    bubble: Fraction | None
    held: tuple[Held, ...]

    def __str__(self) -> str:
        head = f"{self.plan}\nmesh {_write_sizes(self.sizes)}: {self._devices} x {self.device}"
        parts = [head, _write_parameters(self.parameters), _write_collectives(self.collectives)]
        parts.append(_write_memory(self.memory))
        if self.schedule:
            parts.append(f"pipeline {self.schedule}")
        return "\n\n".join(parts)

    @property
    def _devices(self) -> int:
        return math.prod(self.sizes.values())

    def to_svg(self) -> str:
        """Draw the mesh, a box for each device: those of one color hold the same parameters."""
        return draw_mesh(self.sizes, self.held)

    def _repr_html_(self) -> str:
        # What is wider than the notebook scrolls, by the keyboard too.
        region = 'role="region" aria-label="plan" tabindex="0" style="overflow-x: auto"'
        return f"<div {region}>{self.to_svg()}<pre>{html.escape(str(self))}</pre></div>"


def _write_sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def _write_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: int) -> str:
    """Write a table of which the last columns, `right` of them, are numbers."""
    from tabulate import tabulate  # which importing must not cost

    align = ["left"] * (len(head) - right) + ["right"] * right
    return tabulate([head, *rows], tablefmt="plain", disable_numparse=True, colalign=align)


def _write_parameters(parameters: Sequence[ParameterRow]) -> str:
    rows = [
        (
            row.path,
            row.dtype,
            _write_shape(row.shape),
            write_spec(row.spec),
            _write_shape(row.part),
            row.gradient or "-",
        )
        for row in parameters
    ]
    head = ("parameter", "dtype", "shape", "split over", "on a device", "gradient")
    return _write_table(head, rows, 0)


def _write_collectives(collectives: Sequence[Predicted]) -> str:
    if not collectives:
        return "collectives of a step that the plan causes: none"
    from txcore.profiling.report.numbers import format_bytes  # as tabulate

    rows = []
    for one in collectives:
        note = " at most" if one.at_most else " a microbatch" if one.per_microbatch else ""
        note += f" in 1 step of {one.every}" if one.every > 1 else ""
        payload = format_bytes(one.payload_bytes) + note
        rows.append((one.what, one.kind, ", ".join(one.axes), one.dtype, payload))
    head = ("collectives of a step", "kind", "over", "dtype", "payload")
    return _write_table(head, rows, 0)


def _write_memory(memory: Mapping[str, int]) -> str:
    from txcore.profiling.report.numbers import format_bytes  # as tabulate

    rows = [(what, f"{size:,} B", format_bytes(size)) for what, size in memory.items()]
    return _write_table(("memory of a device", "", ""), rows, 2)


def _write_shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def write_spec(spec: P) -> str:
    """Write a spec as its dims: "-, model"; "whole" where nothing is split."""
    if not axes_of(spec):
        return "whole"
    return ", ".join("+".join(entry_axes(entry)) or "-" for entry in spec)
