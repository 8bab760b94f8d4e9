"""Compare two reports."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from txcore.outside import printable
from txcore.profiling.report.findings import Findings
from txcore.profiling.report.numbers import format_bytes
from txcore.profiling.report.rows import Collective
from txcore.profiling.report.table import cut_middle

_WIDTH = 100
_HEAD = ("", "kind", "axes", "dtype", "origin", "wire a call", "name")
_RIGHT = 5  # the column of figures
_SIGNS = {"added": "+", "removed": "-", "grown": "^", "shrunk": "v"}
_Key = tuple[str, str, tuple[str, ...], str, str, bool]


@dataclass(frozen=True)
class Amount:
    """The sum of the rows under one key in one call of the program.

    Attributes:
      rows: how many there are.
      payload_bytes: S times trips.
      wire_bytes: what each device sends.
      at_least: whether not all of both is known: a loop's length, or how many devices talk.
    """

    rows: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0
    at_least: bool = False


@dataclass(frozen=True)
class Change:
    """How much one kind of communication changed.

    Attributes:
      change: "added", "removed", "grown", "shrunk" or "same"; by wire bytes, then by payload.
      name: the tags; else the source's file without the line, which every edit would change;
        else the op_name.
      kind, axes, dtype, origin, explained: as of `Collective`.
      places: "file.py:12" of each, in the later report where it is there at all.
      before: in the earlier report.
      after: in the later report.
    """

    change: str
    name: str
    kind: str
    axes: tuple[str, ...]
    dtype: str
    origin: str
    explained: bool
    places: tuple[str, ...]
    before: Amount
    after: Amount

    @property
    def wire_growth(self) -> int:
        """Return the growth of each device's wire bytes."""
        return self.after.wire_bytes - self.before.wire_bytes


def diff(before: Findings, after: Findings) -> tuple[Change, ...]:
    """Compare two reports by (tags or source's file, kind, axes, dtype, origin, explained).

    Args:
      before: the earlier report.
      after: the later one.

    Returns:
      One change for each key of either report: largest change of the wire bytes first, then by
      key; unchanged keys come last.

    Example:
      >>> row = Collective("all-reduce", "txcore", ("grads",), ("data",), 2, "float32", "float32",
      ...     64, 64, 1, "train.py:40", "jit(step)/psum")
      >>> [(c.change, c.name, c.wire_growth) for c in diff(Findings(()), Findings((row,)))]
      [('added', 'grads', 64)]
    """
    old, new = _by_key(before.collectives), _by_key(after.collectives)
    changes = [_make_change(key, old.get(key, []), new.get(key, [])) for key in {**old, **new}]
    return tuple(sorted(changes, key=_sort_key))


def diff_text(changes: Sequence[Change]) -> str:
    """Write changes for the terminal, in lines of at most 100 columns.

    Args:
      changes: what `diff` returned.

    Returns:
      A table of what changed, and one line that counts it.

    Example:
      >>> print(diff_text(diff(Findings(()), Findings(()))))
      no change: 0 B on the wire of each device in a call
    """
    changed = [c for c in changes if c.change != "same"]
    return "\n".join([*_table_lines(changed), summary(changes)])


def summary(changes: Sequence[Change]) -> str:
    """Count the changes and the bytes in one line.

    Args:
      changes: what `diff` returned.

    Returns:
      "1 added, 2 same: 64 B -> 128 B on the wire of each device in a call".
    """
    counts = Counter(c.change for c in changes)
    before = format_bytes(sum(c.before.wire_bytes for c in changes))
    after = format_bytes(sum(c.after.wire_bytes for c in changes))
    if set(counts) <= {"same"}:
        return f"no change: {after} on the wire of each device in a call"
    said = ", ".join(f"{counts[name]} {name}" for name in (*_SIGNS, "same") if counts[name])
    return f"{said}: {before} -> {after} on the wire of each device in a call"


def format_signed(number: int) -> str:
    """Write a difference of bytes with its sign.

    Example:
      >>> format_signed(-1500), format_signed(0)
      ('-1.5 kB', '0 B')
    """
    sign = {True: "+", False: "-"}[number > 0] if number else ""
    return sign + format_bytes(abs(number))


def _by_key(rows: Iterable[Collective]) -> dict[_Key, list[Collective]]:
    groups: dict[_Key, list[Collective]] = {}
    for row in rows:
        name = ",".join(row.tags) or row.source.rpartition(":")[0] or row.op_name or "?"
        key = (name, row.kind, row.axes, row.dtype, row.origin, row.explained)
        groups.setdefault(key, []).append(row)
    return groups


def _make_change(key: _Key, old: Sequence[Collective], new: Sequence[Collective]) -> Change:
    before, after = _sum_rows(old), _sum_rows(new)
    places = tuple(dict.fromkeys(row.source for row in new or old if row.source))
    return Change(_name_change(before, after), *key, places, before, after)


def _sum_rows(rows: Sequence[Collective]) -> Amount:
    return Amount(
        len(rows),
        sum(row.payload_bytes * row.trips for row in rows),
        sum(row.wire_bytes * row.trips for row in rows),
        not all(row.trips_known and row.wire_known for row in rows),
    )


def _name_change(before: Amount, after: Amount) -> str:
    if not before.rows:
        return "added"
    if not after.rows:
        return "removed"
    old, new = ((a.wire_bytes, a.payload_bytes) for a in (before, after))
    if old == new:
        return "same"
    return "grown" if new > old else "shrunk"


def _sort_key(change: Change) -> tuple[bool, int, _Key]:
    c = change
    key = (c.name, c.kind, c.axes, c.dtype, c.origin, c.explained)
    return c.change == "same", -abs(c.wire_growth), key


def _table_lines(changed: Sequence[Change]) -> list[str]:
    """Lay out the cells; the name takes what the others leave of the width."""
    if not changed:
        return []
    cells = [list(_HEAD), *map(_change_cells, changed)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_HEAD))]
    room = _WIDTH - sum(widths[:-1]) - 2 * (len(_HEAD) - 1)
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if i == _RIGHT else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row[:-1], widths[:-1], strict=True))
        ]
        lines.append("  ".join([*padded, cut_middle(row[-1], room)]).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _change_cells(change: Change) -> list[str]:
    return [
        _SIGNS[change.change],
        cut_middle(printable(change.kind.removeprefix("collective-")), 17),
        cut_middle(printable("+".join(change.axes) or "-"), 12),
        cut_middle(printable(change.dtype), 8),
        cut_middle(printable(change.origin), 12) + ("" if change.explained else "!"),
        _wire_cell(change),
        printable(_label_change(change)),
    ]


def _wire_cell(change: Change) -> str:
    before, after = map(_format_wire, (change.before, change.after))
    if not (change.before.rows and change.after.rows):
        return after if change.after.rows else before
    return (
        f"{before} -> {after}"
        if before != after
        else f"{before} {format_signed(change.wire_growth)}"
    )


def _format_wire(amount: Amount) -> str:
    return f"{'>= ' if amount.at_least else ''}{format_bytes(amount.wire_bytes)}"


def _label_change(change: Change) -> str:
    """Name a change by its tags, or by its first place where it has none."""
    first, *more = change.places or (change.name,)
    if not first.startswith(f"{change.name}:"):
        return change.name
    return f"{first} and {len(more)} more" if more else first
