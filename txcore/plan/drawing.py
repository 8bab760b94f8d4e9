"""Draw a mesh: a box for each device, of one color where the same parameters lie."""

import colorsys
import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_WIDTH, _LINE, _PAD, _GAP = 132, 13, 6, 6  # pixels
_SHOWN = 4  # devices along an axis, of meshes with more than that in all
_MOST = 64  # devices that are all drawn


class Held(NamedTuple):
    """Hold what one device has, for its box.

    Attributes:
      lines: of text.
      part: its index along the axes that split parameters: devices of one index hold the same.
    """

    lines: tuple[str, ...]
    part: tuple[int, ...]


def draw_mesh(sizes: Mapping[str, int], held: Sequence[Held]) -> str:
    """Draw devices in rows and columns; of a mesh with many the first along each axis.

    The last axis goes to the right, the one before it down, the next to the right again, in groups.

    Args:
      sizes: the devices along each axis of the mesh.
      held: what each has, in row-major order.

    Returns:
      SVG.
    """
    active = [(axis, size) for axis, size in sizes.items() if size > 1]
    most = _SHOWN if len(held) > _MOST else max(sizes.values())
    shown = [min(size, most) for _, size in active]
    colors = _color_parts([one.part for one in held])
    height = 2 * _PAD + _LINE * (1 + max(len(one.lines) for one in held))
    boxes, right, down = [], 0, 0
    for place in _list_places(shown):
        number = _number_place(place, [size for _, size in active])
        x, y = _find_corner(place, shown, height)
        right, down = max(right, x + _WIDTH), max(down, y + height)
        boxes.append(_draw_box(x, y, height, f"device {number}", held[number], colors))
    left_out = len(held) - math.prod(shown)
    note = ", ".join(f"{axis}={size}" for axis, size in active) or "one device"
    note += f"; {left_out} devices more" if left_out else ""
    # The boxes are light in any notebook; what is beside them has the notebook's own color.
    text = f'<text x="0" y="{down + _LINE + _GAP}" fill="currentColor">{html.escape(note)}</text>'
    size = f'width="{max(right, 7 * len(note))}" height="{down + 2 * _LINE + _GAP}"'
    style = 'font-family="sans-serif" font-size="10"'
    label = f'role="img" aria-label="{html.escape(note)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style} {label}>'
    return f"{head}{''.join(boxes)}{text}</svg>"


def _list_places(shown: Sequence[int]) -> list[tuple[int, ...]]:
    places: list[tuple[int, ...]] = [()]
    for size in shown:
        places = [(*place, i) for place in places for i in range(size)]
    return places


def _number_place(place: Sequence[int], sizes: Sequence[int]) -> int:
    number = 0
    for index, size in zip(place, sizes, strict=True):
        number = number * size + index
    return number


def _find_corner(place: Sequence[int], shown: Sequence[int], height: int) -> tuple[int, int]:
    """Return where a device's box begins: each second axis, from the last on, goes to the right."""
    corner, steps = [0, 0], [_WIDTH + _GAP, height + _GAP]
    for turn, (index, size) in enumerate(zip(reversed(place), reversed(shown), strict=True)):
        way = turn % 2
        corner[way] += index * steps[way]
        steps[way] = size * steps[way] + 2 * _GAP
    return corner[0], corner[1]


def _color_parts(parts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], str]:
    """Return a light color for each part, far from those of its neighbours."""
    colors = {}
    for i, part in enumerate(dict.fromkeys(parts)):
        rgb = colorsys.hls_to_rgb((0.58 + i * 0.381966) % 1, 0.86, 0.6)
        colors[part] = "#" + "".join(f"{round(255 * value):02x}" for value in rgb)
    return colors


def _draw_box(
    x: int, y: int, height: int, name: str, held: Held, colors: Mapping[tuple[int, ...], str]
) -> str:
    lines = [f'<tspan font-weight="bold">{name}</tspan>', *map(html.escape, held.lines)]
    texts = [
        f'<text x="{x + _PAD}" y="{y + _PAD + _LINE * (i + 1) - 3}">{line}</text>'
        for i, line in enumerate(lines)
    ]
    box = f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{height}" rx="4" stroke="#889"'
    return f'{box} fill="{colors[held.part]}"/>{"".join(texts)}'
