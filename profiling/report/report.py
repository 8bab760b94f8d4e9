"""The result of an audit as data: rows, their parts, the fates of what was declared."""

import dataclasses
import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from txcore.profiling.declared.collectives import Declared
from txcore.profiling.declared.divergence import Divergence
from txcore.profiling.declared.kernels import KernelUse, kernels_line
from txcore.profiling.report.printable import printable

Status = Literal["proved", "not proved", "failed"]
_NAMED_IN_VERDICT = 3
MOST = 10**18  # bytes and executions; what is more is said to be more, and by how much is not
_OVER = "over 10^18"
# What each device sends of these does not depend on how many there are.
_SENT_WHOLE = ("collective-permute", "collective-broadcast", "send")
_HIDDEN = {"autodiff": "left to autodiff", "opaque": "hidden in opaque calls"}
_DIVERGENT = {"hangs": "that not all devices reach", "lies": "of a false type"}


@dataclass(frozen=True)
class Part:
    """One array of a compiled collective, as far as it can be told apart from the others.

    Attributes:
      tag: txcore's tag of it, or "".
      dtype: as declared; the compiled one where no declaration matches.
      wire_dtype: as compiled.
      elements: of S (times n for an all-gather).
      payload_bytes: S of one execution in the declared dtype.
      source: "file.py:12", or "".
      fates: what became of its declaration: see `Fate`; empty where none matches.
    """

    tag: str
    dtype: str
    wire_dtype: str
    elements: int
    payload_bytes: int
    source: str
    fates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program; of a merged one, what has one origin.

    With S as in nccl-tests: the operands' bytes on one device, times n for an all-gather.

    Attributes:
      kind: HLO's name ("all-reduce"), "custom-call" or "unknown".
      origin: "txcore" (tagged), "user" (plain jax), "autodiff", "partitioner", "boundary" (a
        reshard at a shard_map or jit edge), "reshard" (asked for by name), "opaque" (a custom
        call that can communicate) or "unknown" (cannot be read).
      tags: txcore's tags; several where the compiler combined collectives.
      axes: the mesh axes whose groups it talks in; empty where they are none of the mesh's.
      group_size: devices in a group (n); of a permute, devices along `axes`; 0 where the program
        does not say it: then the bytes that depend on it are not known either, and 0.
      dtype: as declared ("bfloat16"); the compiled one where no declaration matches.
      wire_dtype: as compiled; "float32" for a bfloat16 sum that the compiler promoted.
      payload_bytes: S of one execution in the declared dtype.
      wire_bytes: what each device sends in one execution: S in the wire dtype times nccl-tests'
        bus factor: 2(n-1)/n all-reduce; (n-1)/n all-gather, reduce-scatter, all-to-all; else 1.
      trips: executions in one call of the program (loops multiplied).
      source: "file.py:12", the innermost line outside jax and txcore; "" where unknown.
      op_name: jax's path to the primitive, as compiled.
      explained: False where nobody asked for it (`Report.unexplained`).
      trips_known: False in a loop whose length is not known: then `trips` is the least.
      note: where the witnesses disagree or something could not be read, what.
      op: the HLO instruction's name; two rows share it where origins were merged into one op.
      parts: its arrays, in the compiled order.
    """

    kind: str
    origin: str
    tags: tuple[str, ...]
    axes: tuple[str, ...]
    group_size: int
    dtype: str
    wire_dtype: str
    payload_bytes: int
    wire_bytes: int
    trips: int
    source: str
    op_name: str
    explained: bool = True
    trips_known: bool = True
    note: str = ""
    op: str = ""
    parts: tuple[Part, ...] = ()

    @property
    def payload_known(self) -> bool:
        """Tell whether `payload_bytes` says it; nothing does of what cannot be read."""
        if self.kind in ("unknown", "custom-call"):
            return False
        return self.kind != "all-gather" or self.group_size > 0

    @property
    def wire_known(self) -> bool:
        """Tell whether `wire_bytes` says it."""
        return self.payload_known and (self.group_size > 0 or self.kind in _SENT_WHOLE)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain lists, numbers and strings; None is what is not known."""
        row = {name: _figure(value) for name, value in dataclasses.asdict(self).items()}
        row["parts"] = [
            {name: _figure(value) for name, value in dataclasses.asdict(part).items()}
            for part in self.parts
        ]
        unknown = {
            "group_size": self.group_size == 0,
            "payload_bytes": not self.payload_known,
            "wire_bytes": not self.wire_known,
        }
        return row | {name: None for name, is_unknown in unknown.items() if is_unknown}


@dataclass(frozen=True)
class Fate:
    """What became of one declared operand in the compiled program.

    Attributes:
      declared: what the traced program asks for.
      fates: "kept", "combined" (into one op with others), "split" (into several), "unrolled" (from
        a loop into several), "hoisted" (out of a loop), "rewritten" (as another kind or form),
        "promoted" (to a wider dtype), "narrowed" (to a smaller one), "deduplicated" (an equal one
        does its work), "reassociated" (one of a sum does the work of several), "eliminated"
        (nothing used it, or it had no work) or "missing"; several where several things were done.
      rows: places in `Report.collectives` of what it became; empty where it is gone.
    """

    declared: Declared
    fates: tuple[str, ...]
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlanLine:
    """What a plan predicts of a program, and what was found of it.

    Attributes:
      what: "gradients"; beyond the plan the collective's tag, or else its jax primitive.
      kind: HLO's name ("all-reduce").
      axes: the mesh axes.
      dtype: as declared ("float32").
      payload_bytes: S of one step, as in nccl-tests, as predicted; 0 beyond the plan.
      found_bytes: as much of it as the program has; beyond the plan, all of it.
      eliminated_bytes: as much of it as was declared, and the compiler could do without (the
        gradient of a parameter that the loss does not use is a constant).
      factor: of the gradients, whose mean a plan predicts: "mean" where they are that, "sum" where
        they are known to be N times it, "not read" where the program does not tell; "" of others.
      factor_note: which gradients, where, and what of them, unless all are the mean.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    dtype: str
    payload_bytes: int
    found_bytes: int
    eliminated_bytes: int = 0
    factor: str = ""
    factor_note: str = ""

    @property
    def ok(self) -> bool:
        """Tell whether all that the plan predicts is there, and no mean is known to be a sum."""
        return self.factor != "sum" and self.is_there

    @property
    def is_there(self) -> bool:
        """Tell whether all that the plan predicts is sent."""
        return self.found_bytes + self.eliminated_bytes >= self.payload_bytes


@dataclass(frozen=True)
class Report:
    """What an audit found; print it to read it.

    `status` is the answer: "failed" unless it is `ok`, "proved" where it is `exact`, and "not
    proved" in between. `ok`, `exact` and `checked` are what it is made of.

    Attributes:
      collectives: every collective of the compiled program.
      missing: those that the traced program declares and the compiled one lacks.
      checked: whether there was a traced program to compare with; a dump has none.
      fates: what became of each collective that the traced program declares, in its order.
      mesh: the axes of the program's (first) mesh and their sizes.
      target: what it was compiled for: "cpu:8", "tpu:v5p:16x16x16"; "" where unknown.
      divergent: what hangs or lies under a cond or while whose predicate differs.
      plan: what an engine's plan predicts, line by line, and then what is beyond it.
      kernels: which of txcore's kernels it calls, and how often.
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

    @property
    def status(self) -> Status:
        """Return the answer of the audit.

        "failed": something is unexplained, missing, divergent, or short of the plan (not `ok`).
        "not proved": nothing is wrong, but something could not be looked at: there is no traced
        program to compare with (not `checked`), or a collective is left to autodiff or hidden in
        an opaque call.
        "proved": every collective is one that was asked for by name, as the plan predicts if
        there is one (`exact`).
        """
        if not self.ok:
            return "failed"
        return "proved" if self.exact else "not proved"

    @property
    def unexplained(self) -> tuple[Collective, ...]:
        """Return the collectives that nobody asked for, whatever their tags say."""
        return tuple(c for c in self.collectives if not c.explained)

    @property
    def ok(self) -> bool:
        """Tell whether nothing is unexplained, missing, divergent, or short of the plan."""
        faults = self.unexplained or self.missing or self.divergent
        return not faults and all(line.ok for line in self.plan)

    @property
    def exact(self) -> bool:
        """Tell whether it is ok, was checked, and nothing is left to autodiff or opaque."""
        return self.ok and self.checked and not _inexact(self.collectives)

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
        """Tell whether the bytes of a call are the least, since not all of them are known."""
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
            "payload_bytes": _figure(self.payload_bytes),
            "wire_bytes": _figure(self.wire_bytes),
            "at_least": self.at_least,
            "collectives": [c.to_dict() for c in self.collectives],
            "missing": [_declared_dict(d) for d in self.missing],
            "fates": [
                {"declared": _declared_dict(f.declared), "fates": f.fates, "rows": f.rows}
                for f in self.fates
            ],
            "divergent": [dataclasses.asdict(d) for d in self.divergent],
            "plan": [dataclasses.asdict(line) for line in self.plan],
            "kernels": [dataclasses.asdict(use) for use in self.kernels],
        }

    def to_json(self) -> str:
        """Return the report as canonical JSON: sorted keys, no blanks, so that equal is equal."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def to_html(self, path: str | os.PathLike[str], other: "Report | None" = None) -> None:
        """Write the report as one HTML page that needs no network and no script.

        Args:
          path: the file; it is replaced whole or stays as it is.
          other: an earlier report; the page then shows what changed since.

        Raises:
          FileNotFoundError: the file's folder does not exist.
          TypeError: `other` is no report.
        """
        from txcore.profiling.report.html.page import write_html

        write_html(self, path, other)

    def _repr_html_(self) -> str:
        from txcore.profiling.report.html.notebook import frame
        from txcore.profiling.report.html.page import to_html

        return frame(to_html(self), self.verdict())

    def __str__(self) -> str:
        from txcore.profiling.report.table import table  # tabulate, which importing must not cost

        lines = table(self.collectives)
        if self.kernels:
            lines.append(f"kernels: {kernels_line(self.kernels)}")
        # The last line begins with the status too; above a table it is there to be seen at once.
        return "\n".join([*([self.status] if lines else []), *lines, self.verdict()])

    def verdict(self) -> str:
        """Return the status and its reason in one line."""
        reason = _found(self) if self.ok else "; ".join(_faults(self))
        return printable(f"{self.status}: {reason}")


def _found(report: Report) -> str:
    """Say what a program without a fault sends, and what keeps it from being proved."""
    rows = report.collectives
    doubts = [] if report.checked else ["there is no traced program to compare with"]
    doubts += _inexact(rows)
    but = f", but {' and '.join(doubts)}" if doubts else ""
    if not rows:
        return "no collective in the program" if report.checked else f"no collective found{but}"
    counts = Counter(c.origin for c in rows)
    origins = ", ".join(f"{count} {origin}" for origin, count in sorted(counts.items()))
    is_known = all(c.trips_known and c.payload_known for c in rows)
    payload = ("" if is_known else "at least ") + format_bytes(report.payload_bytes)
    sent = f"{_plural(len(rows), 'collective')}, {payload} payload a call"
    if not report.checked:
        return f"{sent}, nothing looks added ({origins}){but}"
    planned = _as_planned(report.plan)
    planned += "".join(f", {line.factor_note}" for line in report.plan if line.factor_note)
    return f"{sent}, all declared ({origins}){planned}; nothing was added{but}"


def _as_planned(plan: tuple[PlanLine, ...]) -> str:
    if not any(line.payload_bytes for line in plan):
        return ""
    beyond = sum(line.found_bytes for line in plan if not line.payload_bytes)
    return ", as the plan predicts" + (f" and {format_bytes(beyond)} beyond" if beyond else "")


def _inexact(rows: tuple[Collective, ...]) -> list[str]:
    """Say what keeps an audit that is ok from being exact."""
    counts = Counter(c.origin for c in rows)
    said = []
    for origin, text in _HIDDEN.items():
        if number := counts[origin]:
            said.append(f"{number} {'is' if number == 1 else 'are'} {text}")
    return said


def _declared_dict(declared: Declared) -> dict[str, Any]:
    row = dataclasses.asdict(declared)
    return {name: value for name, value in row.items() if name not in ("groups", "pairs")}


def format_count(number: int) -> str:
    """Write a number with its thousands apart, or that it is over 10^18."""
    return f"{number:,}" if number <= MOST else _OVER


def _figure(value: Any) -> Any:
    """Return what a report says of a number: itself, or that it is over 10^18."""
    return _OVER if type(value) is int and value > MOST else value


def format_bytes(number: int) -> str:
    """Write a number of bytes with three digits and its decimal unit.

    Example:
      >>> format_bytes(1664300), format_bytes(10**40)
      ('1.66 MB', 'over 10^18 B')
    """
    if number > MOST:
        return f"{_OVER} B"
    size, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{number} B" if unit == "B" else f"{size:.3g} {unit}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _faults(report: Report) -> list[str]:
    faults = []
    if unexplained := report.unexplained:
        total = _plural(len(report.collectives), "collective")
        named = [_name(c) for c in unexplained[:_NAMED_IN_VERDICT]]
        some = _some(named, len(unexplained))
        faults.append(f"{len(unexplained)} of {total} unexplained: {some}")
    if report.missing:
        named = [
            f"{d.tag or d.primitive} over {'+'.join(d.axes)} at {d.source or '?'}"
            for d in report.missing
        ]
        faults.append(f"{len(named)} declared but missing: {_some(named)}")
    for problem, text in _DIVERGENT.items():
        if named := [str(d) for d in report.divergent if d.problem == problem]:
            faults.append(f"{len(named)} {text}: {_some(named)}")
    faults += [
        f"the plan predicts {line.payload_bytes:,} B of {line.what} ({line.dtype} {line.kind} over "
        f"{'+'.join(line.axes)}), found {line.found_bytes + line.eliminated_bytes:,} B"
        for line in report.plan
        if not line.is_there
    ]
    faults += [line.factor_note for line in report.plan if line.factor == "sum"]
    return faults


def _name(row: Collective) -> str:
    axes = f" over {'+'.join(row.axes)}" if row.axes else ""
    place = f" at {row.source}" if row.source else ""
    note = f": {row.note}" if row.note else ""
    return f"{row.kind}{axes}{place} ({row.origin}{note})"


def _some(named: list[str], count: int | None = None) -> str:
    more = (len(named) if count is None else count) - _NAMED_IN_VERDICT
    return ", ".join(named[:_NAMED_IN_VERDICT]) + (f" and {more} more" if more > 0 else "")
