"""An audit's findings as data, and the answer that follows from them."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from txcore.profiling.compiled_with import CompiledWith
from txcore.profiling.declared.collectives import Declared
from txcore.profiling.declared.divergence import Divergence
from txcore.profiling.declared.kernels import KernelUse
from txcore.profiling.report.numbers import cap_figure
from txcore.profiling.report.rows import Collective, Fate, PlanLine

if TYPE_CHECKING:
    from txcore.profiling.program import Program

Status = Literal["proved", "not proved", "failed"]
UNEXPLAINED = ("partitioner", "boundary", "unknown")  # origins of what nobody asked for
_HIDDEN = {
    "autodiff": "left to autodiff",
    "opaque": "hidden in opaque calls",
    "simulated": "simulated by callbacks on the host",
}


@dataclass(frozen=True)
class Findings:
    """An audit's findings, as data.

    `status` is the answer: "failed" unless it is `ok`, "proved" where it is `exact`, and "not
    proved" in between. `ok`, `exact` and `checked` are what it is made of.

    Attributes:
      collectives: every collective of the compiled program.
      missing: those that the traced program declares and the compiled one lacks.
      checked: whether there was a traced program to compare with; a dump has none.
      fates: what became of each collective that the traced program declares, in its order.
      mesh: the axes of the program's (first) mesh and their sizes.
      target: what it was compiled for: "cpu:8", "tpu:v5p:16x16x16"; "" where unknown.
      divergent: hangs and false types under a cond or while whose predicate differs.
      plan: an engine's plan, line by line, and then the collectives beyond it.
      kernels: the kernels of txcore that it calls, and how often.
      compiled_with: XLA options and jax's settings; None where unknown.
      program: what was audited, with its stages (`program.compiled.memory_analysis()`); None of a
        text or of what was compiled before. It is no part of the findings.
    """

    collectives: tuple[Collective, ...]
    missing: tuple[Declared, ...] = ()
    checked: bool = True
    fates: tuple[Fate, ...] = ()
    mesh: tuple[tuple[str, int], ...] = ()
    target: str = ""
    divergent: tuple[Divergence, ...] = ()
    plan: tuple[PlanLine, ...] = ()
    kernels: tuple[KernelUse, ...] = ()
    compiled_with: CompiledWith | None = None
    program: "Program | None" = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def status(self) -> Status:
        """Return the answer of the audit.

        "failed": something is unexplained, missing, divergent, or short of the plan (not `ok`).
        "not proved": nothing is wrong, but the audit could not see everything: there is no traced
        program to compare with (not `checked`), or a collective is left to autodiff or hidden in
        an opaque call.
        "proved": every collective was asked for by name, as the plan predicts if there is one
        (`exact`).
        """
        if not self.ok:
            return "failed"
        return "proved" if self.exact else "not proved"

    @property
    def unexplained(self) -> tuple[Collective, ...]:
        """Return the collectives that nobody asked for, whatever their tags say."""
        return tuple(c for c in self.collectives if not c.explained)

    @property
    def let_through(self) -> tuple[Collective, ...]:
        """Return the collectives that nobody asked for, and that `Report.allowing` lets through."""
        return tuple(c for c in self.collectives if c.explained and c.origin in UNEXPLAINED)

    @property
    def ok(self) -> bool:
        """Tell whether nothing is unexplained, missing, divergent, or short of the plan."""
        faults = self.unexplained or self.missing or self.divergent
        return not faults and all(line.ok for line in self.plan)

    @property
    def exact(self) -> bool:
        """Tell whether it is ok, checked, and nothing left to autodiff, opaque or let through."""
        doubts = list_doubts(self.collectives, self.fates) or self.let_through
        return self.ok and self.checked and not doubts

    @property
    def payload_bytes(self) -> int:
        """Return the payload of one call of the program: S times trips, of all collectives."""
        return sum(c.payload_bytes * c.trips for c in self.collectives)

    @property
    def wire_bytes(self) -> int:
        """Return what each device sends in one call of the program."""
        return sum(c.wire_bytes * c.trips for c in self.collectives)

    @property
    def at_least(self) -> bool:
        """Tell whether the bytes of a call are lower bounds, since not all of them are known."""
        return not all(c.trips_known and c.wire_known for c in self.collectives)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain lists, numbers and strings."""
        return {
            "status": self.status,
            "ok": self.ok,
            "exact": self.exact,
            "checked": self.checked,
            "target": self.target,
            "mesh": dict(self.mesh),
            "payload_bytes": cap_figure(self.payload_bytes),
            "wire_bytes": cap_figure(self.wire_bytes),
            "at_least": self.at_least,
            "collectives": [c.to_dict() for c in self.collectives],
            "missing": [_declared_dict(d) for d in self.missing],
            "fates": [
                {"declared": _declared_dict(f.declared), "fates": f.fates, "rows": f.rows}
                for f in self.fates
            ],
            "divergent": [dataclasses.asdict(d) for d in self.divergent],
            "plan": [dataclasses.asdict(line) for line in self.plan],
            "compiled_with": self.compiled_with.changed if self.compiled_with else {},
            "kernels": [dataclasses.asdict(use) for use in self.kernels],
        }

    def to_json(self) -> str:
        """Return the report as canonical JSON: sorted keys, no blanks, so that equal is equal."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))


def list_doubts(rows: Sequence[Collective], fates: Sequence[Fate] = ()) -> list[str]:
    """List the reasons why an audit that is ok is not exact."""
    counts = Counter(c.origin for c in rows)
    counts["simulated"] = sum("simulated" in fate.fates for fate in fates)
    said = []
    for origin, text in _HIDDEN.items():
        if number := counts[origin]:
            said.append(f"{number} {'is' if number == 1 else 'are'} {text}")
    return said


def _declared_dict(declared: Declared) -> dict[str, Any]:
    row = dataclasses.asdict(declared)
    return {name: value for name, value in row.items() if name not in ("groups", "pairs")}
