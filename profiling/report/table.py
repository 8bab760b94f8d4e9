"""An audit's rows as a table for the terminal."""

from tabulate import tabulate

from txcore.outside import printable
from txcore.profiling.report.numbers import format_bytes
from txcore.profiling.report.rows import Collective

_WIDTH = 100
_MOST_ROWS = 5000
_HEAD = ("kind", "axes", "n", "dtype", "payload", "wire", "trips", "origin", "tags", "source")
_ALIGN = ("left", "left", "right", "left", "right", "right", "right", "left", "left", "left")
_SHORT_KIND = {
    "collective-permute": "permute",
    "collective-broadcast": "broadcast",
    "ragged-all-to-all": "ragged-a2a",
}


def table_lines(rows: tuple[Collective, ...]) -> list[str]:
    """Return the lines of a table of at most 100 columns; none where there is no row.

    It shows 5,000 rows; the last line counts the others.
    """
    if not rows:
        return []
    cells = [list(_HEAD), *map(_row_cells, rows[:_MOST_ROWS])]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_HEAD))]
    # The last two columns share what the others and the blanks between them leave.
    room = _WIDTH - sum(widths[:-2]) - 2 * (len(_HEAD) - 1)
    for_source = min(widths[-1], max(room // 2, room - widths[-2]))
    for row in cells:
        row[-2:] = [cut_middle(row[-2], room - for_source), cut_middle(row[-1], for_source)]
    # As a row of its own the head costs no padding, which tabulate adds to real headers.
    table = tabulate(cells, tablefmt="plain", disable_numparse=True, colalign=_ALIGN)
    lines = [line.rstrip() for line in table.splitlines()]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:], *_left_out_line(rows[_MOST_ROWS:])]


def _left_out_line(rows: tuple[Collective, ...]) -> list[str]:
    if not rows:
        return []
    unexplained = sum(not row.explained for row in rows)
    return [f"and {len(rows):,} rows more, {unexplained:,} of them unexplained: to_json has all"]


def _row_cells(row: Collective) -> list[str]:
    dtype = row.dtype if row.dtype == row.wire_dtype else f"{row.dtype}>{row.wire_dtype}"
    return [
        _SHORT_KIND.get(row.kind, row.kind),
        cut_middle("+".join(row.axes) or "-", 12),
        cut_middle(str(row.group_size or "?"), 12),
        cut_middle(_short_dtypes(dtype), 8),
        format_bytes(row.payload_bytes) if row.payload_known else "?",
        format_bytes(row.wire_bytes) if row.wire_known else "?",
        f"{_short_count(row.trips)}{'' if row.trips_known else '+'}",
        row.origin,
        printable(",".join(row.tags) or "-"),
        printable(row.source or "-"),
    ]


def _short_count(number: int) -> str:
    return str(number) if number < 10**9 else "many"


def _short_dtypes(names: str) -> str:
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i")):
        names = names.replace(long, short)
    return names.replace("complex", "c")


def cut_middle(text: str, width: int) -> str:
    """Cut the middle out of a text that is longer than `width`."""
    if len(text) <= width:
        return text
    tail = (width - 2) // 2
    return f"{text[: width - 2 - tail]}..{text[len(text) - tail :]}"
