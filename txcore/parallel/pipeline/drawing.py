"""Draw schedules as the papers on pipelines do: a row a device, time to the right."""

from collections.abc import Callable

import numpy as np

from txcore.parallel.pipeline.slots import IDLE, Slots

Label = Callable[[str, int, int], str]
# Of the zero-bubble paper's pictures: forward blue, backward teal, weight green.
_COLORS = {"F": "#4a7dd6", "B": "#67c6cf", "W": "#6dbb6d"}
_UNIT, _ROW = 26, 24  # pixels: of a unit of time, and of a device


def draw_text(label: Label, forward: Slots, backward: Slots, weight: Slots) -> list[str]:
    """Write one line for each device, "." where it waits.

    A tick at which any device does two things has a column for each kind of work, others one.
    """
    kinds = {"F": forward, "B": backward, "W": weight}
    ticks, stages = forward.microbatch.shape
    columns = []
    for tick in range(ticks):
        busy = {k: slots.microbatch[tick] != IDLE for k, slots in kinds.items()}
        used = [k for k in kinds if busy[k].any()]
        together = [used] if np.sum([busy[k] for k in kinds], 0).max() < 2 else [[k] for k in used]
        for group in together:
            cells = ["."] * stages
            for k in group:
                for stage in np.flatnonzero(busy[k]):
                    slots = kinds[k]
                    cells[stage] = label(k, slots.microbatch[tick, stage], slots.chunk[tick, stage])
            columns.append(cells)
    width = max(len(cell) for cells in columns for cell in cells)
    rows = zip(*columns, strict=True)
    return [
        f"device {stage}  " + " ".join(cell.ljust(width) for cell in row).rstrip()
        for stage, row in enumerate(rows)
    ]


def draw_svg(
    label: Label, forward: Slots, backward: Slots, weight: Slots, lengths: tuple[int, int, int]
) -> str:
    """Draw a box for each pass, as long as it takes; a tick is as long as its busiest device."""
    kinds = {"F": forward, "B": backward, "W": weight}
    ticks, stages = forward.microbatch.shape
    boxes, start = [], 0
    for tick in range(ticks):
        ends = [start] * stages
        for (kind, slots), length in zip(kinds.items(), lengths, strict=True):
            for stage in np.flatnonzero(slots.microbatch[tick] != IDLE):
                text = label(kind, slots.microbatch[tick, stage], slots.chunk[tick, stage])
                boxes.append(_draw_box(ends[stage], int(stage), length, _COLORS[kind], text))
                ends[stage] += length
        start = max(ends)
    size = f'width="{start * _UNIT}" height="{stages * _ROW}"'
    style = 'font-family="sans-serif" font-size="10" text-anchor="middle"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>' + "".join(boxes) + "</svg>"


def _draw_box(start: int, stage: int, length: int, color: str, text: str) -> str:
    x, y, width = start * _UNIT, stage * _ROW, length * _UNIT
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{_ROW}" fill="{color}" stroke="white"/>'
        f'<text x="{x + width / 2:g}" y="{y + _ROW / 2 + 4:g}">{text}</text>'
    )
