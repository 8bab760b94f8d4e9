"""The data of a report: rows, their parts, fates, and the plan's lines."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from txcore.profiling.declared.collectives import Declared
from txcore.profiling.report.numbers import cap_figure

# Each device sends the whole of these, whatever the size of its group.
_NOT_WRITTEN = ("op_name", "place", "types")  # of a part: they depend on the place of the files
_SENT_WHOLE = ("collective-permute", "collective-broadcast", "send", "remote-dma")


@dataclass(frozen=True)
class Part:
    """One array of a compiled collective, where it can be told apart from the others.

    Attributes:
      tag: txcore's tag of it, or "".
      dtype: as declared; the compiled one where no declaration matches.
      wire_dtype: as compiled.
      elements: of S (times n for an all-gather).
      payload_bytes: S of one execution in the declared dtype.
      source: "file.py:12", or "".
      fates: what became of its declaration: see `Fate`; empty where none matches.
      op_name: jax's path to what needed it, where it is told apart; not in `to_dict`.
      place: its source with the file's whole path, where none matches; not in `to_dict`.
      types: where none matches, how it lies before and after, as jax writes types; "" where the
        text does not show it; not in `to_dict`.
    """

    tag: str
    dtype: str
    wire_dtype: str
    elements: int
    payload_bytes: int
    source: str
    fates: tuple[str, ...] = ()
    op_name: str = ""
    place: str = ""
    types: tuple[str, str] = ("", "")

    def to_dict(self) -> dict[str, Any]:
        """Return what does not depend on where the program's files lie."""
        fields = {name: cap_figure(value) for name, value in dataclasses.asdict(self).items()}
        return {name: value for name, value in fields.items() if name not in _NOT_WRITTEN}


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program, or the arrays of one origin in a merged one.

    With S as in nccl-tests: the operands' bytes on one device, times n for an all-gather.

    Attributes:
      kind: HLO's name ("all-reduce"), "custom-call" or "unknown"; "remote-dma" for a custom call
        that runs a Pallas kernel of the traced program, whose copies to other devices were counted.
      origin: "txcore" (tagged), "user" (plain jax), "autodiff", "partitioner", "boundary" (a
        reshard at a shard_map or jit edge), "reshard" (asked for by name), "opaque" (a custom
        call that can communicate) or "unknown" (cannot be read).
      tags: txcore's tags; several where the compiler combined collectives.
      axes: the mesh axes whose groups it talks in; empty where they are none of the mesh's.
      group_size: devices in a group (n); of a permute, devices along `axes`; 0 where the program
        does not have it: then the bytes that depend on it are not known either, and 0.
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
        """Tell whether `payload_bytes` is known; it is not for rows that cannot be read."""
        if self.kind in ("unknown", "custom-call"):
            return False
        return self.kind != "all-gather" or self.group_size > 0

    @property
    def wire_known(self) -> bool:
        """Tell whether `wire_bytes` is known."""
        return self.payload_known and (self.group_size > 0 or self.kind in _SENT_WHOLE)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain lists, numbers and strings; unknown values are None."""
        row = {name: cap_figure(value) for name, value in dataclasses.asdict(self).items()}
        row["parts"] = [part.to_dict() for part in self.parts]
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
        (nothing used it, or it had no work), "simulated" (a Pallas kernel that callbacks on the
        host interpret) or "missing"; several where the compiler did several.
      rows: its places in `Report.collectives`; empty where it is gone.
    """

    declared: Declared
    fates: tuple[str, ...]
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlanLine:
    """One line of a plan's prediction, and the bytes of it that were found.

    Attributes:
      what: "gradients"; beyond the plan the collective's tag, or else its jax primitive.
      kind: HLO's name ("all-reduce").
      axes: the mesh axes.
      dtype: as declared ("float32").
      payload_bytes: S of one step, as in nccl-tests, as predicted; 0 beyond the plan.
      found_bytes: the part of it that the program sends; beyond the plan, all of it.
      eliminated_bytes: the part that was declared and that the compiler eliminated (the gradient
        of a parameter that the loss does not use is a constant).
      times: how often a loop sends it: once in each of so many trips, where the plan predicts it
        once (gradients that are reduced for each microbatch).
      at_most: whether a program may send less: what it gathers again for its backward pass is what
        that needs.
      every: it is sent in one call of so many, in a branch of the program: the bytes are those of
        such a call.
      factor: for gradients, whose mean a plan predicts: "mean" where they are the mean, "sum" where
        they are known to be N times it, "not read" where the program does not tell; else "".
      factor_note: which gradients are not known to be the mean, where, and why; else "".
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    dtype: str
    payload_bytes: int
    found_bytes: int
    eliminated_bytes: int = 0
    times: int = 1
    at_most: bool = False
    every: int = 1
    factor: str = ""
    factor_note: str = ""

    @property
    def ok(self) -> bool:
        """Tell whether the program sends all that the plan predicts, and no sum for a mean."""
        return self.factor != "sum" and self.is_there

    @property
    def is_there(self) -> bool:
        """Tell whether the program sends all that the plan predicts."""
        return self.at_most or self.found_bytes + self.eliminated_bytes >= self.payload_bytes
