"""Write the costs of a program for the terminal."""

from collections.abc import Iterator, Sequence

from tabulate import tabulate

from txcore.profiling.cost.model import CostModel
from txcore.profiling.cost.schedule import Overlap
from txcore.profiling.report.numbers import format_bytes
from txcore.profiling.report.table import cut_middle

_WIDTH = 100
_LONGEST_AXES, _LONGEST_SHAPE = 12, 16


def write_lines(costs: CostModel) -> list[str]:
    """Return the lines of all parts, of at most 100 columns each."""
    parts = (
        _traffic_lines(costs),
        _memory_lines(costs),
        _replicated_lines(costs),
        _schedule_lines(costs),
        _step_lines(costs),
    )
    return [line for part in parts for line in part]


def format_seconds(seconds: float) -> str:
    """Write a time with three digits and its unit.

    Example:
      >>> format_seconds(0.0004049), format_seconds(2.5)
      ('405 us', '2.5 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def format_flops(number: int) -> str:
    """Write a number of FLOPs with three digits and its decimal unit.

    Example:
      >>> format_flops(34359738368)
      '34.4 GFLOP'
    """
    return format_bytes(number).removesuffix("B") + "FLOP"


def _traffic_lines(costs: CostModel) -> Iterator[str]:
    yield _title_line(costs)
    if not costs.totals:
        yield "no collective in the program"
        return
    head = ("kind", "axes", "n", "calls", "payload", "wire", "bus factor")
    rows = [
        [
            total.kind,
            _format_axes(total.axes),
            str(total.group_size or "?"),
            str(total.calls),
            format_bytes(total.payload_bytes),
            format_bytes(total.wire_bytes),
            f"{total.bus_factor:.4g}",
        ]
        for total in costs.totals
    ]
    yield from _table_lines(head, rows, "llrrrrr")


def _title_line(costs: CostModel) -> str:
    mesh = ", ".join(f"{name}={size}" for name, size in costs.report.mesh)
    target = costs.report.target or "one device"
    title = f"one call on each device of {target}" + (f" ({mesh})" if mesh else "") + ":"
    return cut_middle(title, _WIDTH)


def _memory_lines(costs: CostModel) -> Iterator[str]:
    yield ""
    found = costs.memory
    if found is None:
        yield "memory: this platform's compiler does not say"
        return
    peak = f"memory: {format_bytes(found.peak)} at the peak"
    if costs.memory_size:
        share = found.peak / costs.memory_size
        peak += f", {share:.1%} of {format_bytes(costs.memory_size)}"
        peak += ": DOES NOT FIT" if share > 1 else ""
    yield peak
    yield (
        f"  {format_bytes(found.arguments)} arguments, {format_bytes(found.results)} results "
        f"({format_bytes(found.reused)} reuse arguments), "
        f"{format_bytes(found.temporaries)} temporaries, {format_bytes(found.code)} code"
    )


def _replicated_lines(costs: CostModel) -> Iterator[str]:
    if not costs.replicated:
        return
    saved = sum(row.saved_bytes for row in costs.replicated)
    yield ""
    yield f"replicated, though sharding would save {format_bytes(saved)} on each device:"
    head = ("array", "shape", "dtype", "bytes", "same along", "shard", "saves")
    rows = [
        [
            row.path,
            cut_middle("x".join(map(str, row.shape)), _LONGEST_SHAPE),
            row.dtype,
            format_bytes(row.bytes),
            _format_axes(row.axes),
            f"dim {row.shard_dim} by {_format_axes(row.shard_axes)}",
            format_bytes(row.saved_bytes),
        ]
        for row in costs.replicated
    ]
    yield from _table_lines(head, rows, "lllrllr")


def _schedule_lines(costs: CostModel) -> Iterator[str]:
    rows = costs.schedule.overlaps
    if not rows:
        return
    yield ""
    is_timed = costs.schedule.seconds is not None
    number = sum(row.is_async for row in rows)
    yield (
        f"schedule: {number} of {len(rows)} collectives have a start and a done apart"
        if number
        else "schedule: nothing is asynchronous, so all communication is exposed"
    )
    head = ["collective", "axes", "calls", "FLOP between", "bytes between"]
    head += ["time", "exposed", "hidden"] if is_timed else []
    cells = [_overlap_cells(row, costs) for row in rows]
    yield from _table_lines(head, cells, "llrrrrrr"[: len(head)])
    for note in dict.fromkeys(row.note for row in rows if row.note):
        named = [row.op for row in rows if row.note == note]
        yield cut_middle(f"  {note}: {', '.join(named)}", _WIDTH)


def _overlap_cells(row: Overlap, costs: CostModel) -> list[str]:
    named = costs.row_of(row)
    cells = [
        ",".join(named.tags if named else ()) or row.op,
        _format_axes(named.axes if named else ()),
        str(row.trips),
        format_flops(row.flops) if row.is_async else "-",
        format_bytes(row.bytes) if row.is_async else "-",
    ]
    if row.seconds is None or row.exposed_seconds is None or row.hidden is None:
        return cells
    times = [format_seconds(row.seconds), format_seconds(row.exposed_seconds)]
    return [*cells, *times, f"{row.hidden:.0%}"]


def _step_lines(costs: CostModel) -> Iterator[str]:
    found = costs.schedule
    yield ""
    work = f"{format_flops(found.flops)} and {format_bytes(found.bytes)} of memory traffic a call"
    least = "" if found.is_exact else " at least (a loop's length is not known)"
    remade = (
        "XLA's rematerialisation is active, since memory is short: "
        f"{format_flops(found.remade_flops)} computed anew"
    )
    if found.seconds is None:
        yield f"step: {work}{least}; give target= for the time of a TPU or GPU"
        if found.remade_flops:
            yield f"  {remade}"
        return
    assert found.compute_seconds is not None
    assert found.exposed_seconds is not None
    yield (
        f"step: {format_seconds(found.seconds)} predicted{least}: "
        f"{format_seconds(found.compute_seconds)} computing, "
        f"{format_seconds(found.exposed_seconds)} waiting ({found.hidden:.0%} hidden)"
    )
    yield f"  {work}; at the chip's peaks, which no real step reaches"
    if found.remade_flops:
        yield f"  {remade}"


def _format_axes(axes: Sequence[str]) -> str:
    return cut_middle("+".join(axes) or "-", _LONGEST_AXES)


def _table_lines(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Lay out a table whose first column is cut to what the others leave."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(1, len(head))]
    room = _WIDTH - sum(widths) - 2 * (len(head) - 1)
    for row in cells:
        row[0] = cut_middle(row[0], max(room, 8))
    names = {"l": "left", "r": "right"}
    table = tabulate(
        cells, tablefmt="plain", disable_numparse=True, colalign=[names[a] for a in align]
    )
    found = [line.rstrip() for line in table.splitlines()]
    return [found[0], "-" * max(map(len, found)), *found[1:]]
