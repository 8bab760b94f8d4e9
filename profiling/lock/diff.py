"""Compare two locks, and print the differences."""

from collections.abc import Sequence
from dataclasses import dataclass

from txcore.outside import printable
from txcore.profiling.lock.model import Entry, Lock
from txcore.profiling.report.numbers import format_bytes
from txcore.profiling.report.table import cut_middle

_WIDTH = 100


@dataclass(frozen=True)
class Change:
    """One entry that differs: `old` or `new` is None where the other lock alone has it."""

    old: Entry | None
    new: Entry | None

    @property
    def grew(self) -> bool:
        """Tell whether it is new, sends more bytes or more often, or lost its known trips."""
        if self.old is None or self.new is None:
            return self.old is None
        return (
            self.new.payload_bytes > self.old.payload_bytes
            or self.new.trips > self.old.trips
            or self.old.trips_known > self.new.trips_known
        )

    @property
    def entry(self) -> Entry:
        """Return the new entry, or the old one where it is gone."""
        entry = self.new or self.old
        assert entry is not None, "a change has an old or a new entry"
        return entry

    @property
    def sign(self) -> str:
        """Return "+" for a new entry, "-" for one that is gone, "~" for a changed one."""
        return "+" if self.old is None else "-" if self.new is None else "~"


def compare(old: Lock, new: Lock) -> tuple[Change, ...]:
    """List the entries in which two locks differ.

    Args:
      old: the locked entries.
      new: the entries of the program now.

    Returns:
      The changes in the order of the file; empty where both send the same.

    Example:
      >>> was = Entry("psum/grads", "", "all-reduce", ("data",), "float32", "txcore", 400, 1)
      >>> now = Entry("psum/grads", "", "all-reduce", ("data",), "float32", "txcore", 800, 1)
      >>> changes = compare(Lock("cpu:8", (was,)), Lock("cpu:8", (now,)))
      >>> print(*write_changes(changes))
      ~ psum/grads  all-reduce  data  float32  400 B -> 800 B  x1  txcore
      >>> changes[0].grew
      True
    """
    before, after = ({entry.key: entry for entry in lock.entries} for lock in (old, new))
    pairs = [(before.get(key), after.get(key)) for key in sorted({*before, *after})]
    return tuple(Change(was, now) for was, now in pairs if was != now)


def write_changes(changes: Sequence[Change]) -> list[str]:
    """Print changes as aligned lines of at most 100 columns."""
    from tabulate import tabulate  # which importing must not cost

    if not changes:
        return []
    cells = [[printable(cell) for cell in _change_cells(change)] for change in changes]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # The first and the last column share what the others and the blanks between them leave.
    room = _WIDTH - sum(widths[1:-1]) - 2 * (len(widths) - 1)
    for_source = min(widths[-1], max(room // 3, room - widths[0]))
    for row in cells:
        row[0] = cut_middle(row[0], max(room - for_source, 12))
        row[-1] = cut_middle(row[-1], max(for_source, 0))
    align = ("left",) * 4 + ("right",) * 2 + ("left",) * 2
    text = tabulate(cells, tablefmt="plain", disable_numparse=True, colalign=align)
    return [cut_middle(line.rstrip(), _WIDTH) for line in text.splitlines()]


def _change_cells(change: Change) -> list[str]:
    entry = change.entry
    return [
        f"{change.sign} {entry.tag or entry.source or '?'}",
        cut_middle(entry.kind.removeprefix("collective-"), 14),
        cut_middle("+".join(entry.axes) or "-", 12),
        cut_middle(entry.dtype or "-", 8),
        _bytes_cell(change),
        _format_change(_format_trips(change.old), _format_trips(change.new)),
        entry.origin,
        ",".join(entry.places),
    ]


def _bytes_cell(change: Change) -> str:
    old, new = change.old, change.new
    if old is None or new is None or old.payload_bytes == new.payload_bytes:
        return format_bytes(change.entry.payload_bytes)
    before, after = format_bytes(old.payload_bytes), format_bytes(new.payload_bytes)
    if before != after:
        return f"{before} -> {after}"
    more = new.payload_bytes - old.payload_bytes
    return f"{before} {'+' if more > 0 else '-'}{format_bytes(abs(more))}"


def _format_trips(entry: Entry | None) -> str:
    return "" if entry is None else f"x{entry.trips}{'' if entry.trips_known else '+'}"


def _format_change(before: str, after: str) -> str:
    return f"{before} -> {after}" if before and after and before != after else after or before
