"""The costs of a program as data: totals by kind and axes, memory, schedule."""

import dataclasses
import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from txcore.profiling.bandwidth import bus_factor
from txcore.profiling.cost.memory import Memory
from txcore.profiling.cost.replicated import Replicated
from txcore.profiling.cost.schedule import Overlap, Schedule
from txcore.profiling.report import Collective, Report


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
class CostModel:
    """What one call of a program costs, as data.

    Attributes:
      report: the audit of its collectives.
      totals: what they send by kind and axes, the most on the wire first.
      memory: bytes on each device; None where the compiler does not say.
      memory_size: bytes of memory of a device of the target; None where not known.
      replicated: arrays that could be sharded, the largest savings first.
      schedule: which compute hides which collective, and the predicted time at the target's peaks.
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
                "remade_flops": plan.remade_flops,
            },
        }

    def _overlap_dict(self, overlap: Overlap) -> dict[str, Any]:
        row = self.row_of(overlap)
        names = {"axes": row.axes if row else (), "tags": row.tags if row else ()}
        return {**dataclasses.asdict(overlap), **names, "hidden": overlap.hidden}

    def to_json(self) -> str:
        """Return the costs as canonical JSON: sorted keys, no blanks, so that equal is equal."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))


def total_by_axis(report: Report) -> tuple[Total, ...]:
    """Add up what the collectives of a report send, by kind and mesh axes.

    Args:
      report: from an audit.

    Returns:
      The totals, the most on the wire first. Unreadable rows are left out; the report's verdict
      names them.
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
