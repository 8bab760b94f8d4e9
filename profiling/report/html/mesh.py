"""Draw the mesh: a row, a sheet or a block of devices, with one group of each set of axes."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from txcore.profiling.report.findings import Findings
from txcore.profiling.report.html.figures import AxisSet, axis_sets, name_axes
from txcore.profiling.report.html.markup import Html, el, join_html
from txcore.profiling.report.table import cut_middle

_MOST_SQUARES = 32  # along an axis; a longer one is drawn with several devices to a square
_NUMBERED = 64  # devices in a flat mesh up to which each shows its number
_EXTENT = 300.0  # of the drawing, without its labels
_DEPTH = (0.5, -0.4)  # one step backwards, in squares to the right and down
_CHAR = 6.8  # width of a letter of a label
_LABEL = 20.0

Point = tuple[float, float]
Box = tuple[int, int, int]  # squares to the right, down and backwards
_Sets = dict[int, AxisSet]  # those that can be drawn, by the number that the rows name them by


@dataclass(frozen=True)
class _Axis:
    """One axis as drawn: `squares` of `step` devices each."""

    name: str
    size: int
    squares: int
    step: int


@dataclass(frozen=True)
class _Drawing:
    """The axes to the right, down and backwards (None where there are fewer), and the scale."""

    axes: tuple[_Axis | None, _Axis | None, _Axis | None]
    side: float

    @property
    def box(self) -> Box:
        x, y, z = (axis.squares if axis else 1 for axis in self.axes)
        return x, y, z

    @property
    def flat(self) -> bool:
        return self.axes[2] is None

    def place_at(self, x: float, y: float, z: float = 0) -> Point:
        return self.side * (x + z * _DEPTH[0]), self.side * (y + z * _DEPTH[1])


def mesh_section(report: Findings) -> Html:
    """Draw the mesh, and list the groups of devices that its axes make.

    Args:
      report: any report; one without a mesh says so.

    Returns:
      The section. Exactly one group is highlighted: of the axes that carry the most bytes.
    """
    title = el("h2", "Mesh")
    if not report.mesh:
        return el("section", title, el("p", "The report names no mesh.", class_="quiet"))
    drawn = [_axis_as_drawn(name, size) for name, size in report.mesh if size > 1]
    drawing = _lay_out_axes(drawn[-3:])
    known = {name for name, _ in report.mesh}
    sets = {n: axes for n, axes in enumerate(axis_sets(report)) if axes and set(axes) <= known}
    first = _find_busiest(report, sets)
    return el(
        "section",
        title,
        _draw_svg(
            drawing, _draw_highlights(drawing, sets, first), f"Lit up: {name_axes(sets[first])}"
        ),
        *(el("p", line, class_="quiet") for line in _legend_lines(drawn)),
        _groups_list(report.mesh, sets, first),
        class_="mesh",
    )


def _axis_as_drawn(name: str, size: int) -> _Axis:
    """Choose how many devices a square holds: a divisor of the size where possible."""
    least = -(-size // _MOST_SQUARES)
    squares = next((n for n in range(_MOST_SQUARES, 7, -1) if size % n == 0), None)
    step = least if size <= _MOST_SQUARES or squares is None else size // squares
    return _Axis(name, size, -(-size // step), step)


def _lay_out_axes(axes: Sequence[_Axis]) -> _Drawing:
    """Lay the last axis to the right, the one before it down and the one before that backwards."""
    x, y, z = [*reversed(axes), None, None, None][:3]
    across, down, back = (axis.squares if axis else 1 for axis in (x, y, z))
    deep = back if z else 0
    longest = max(across + deep * _DEPTH[0], down - deep * _DEPTH[1])
    return _Drawing((x, y, z), min(36.0, _EXTENT / longest))


def _draw_svg(drawing: _Drawing, highlights: Html, title: str) -> Html:
    x, y, z = drawing.box
    back = drawing.place_at(0, 0, 0 if drawing.flat else z)
    left = _LABEL if drawing.axes[1] else 4.0
    right = 8.0 + (_CHAR * len(_label_text(drawing.axes[2])) if drawing.axes[2] else 0.0)
    # Labels that are longer than what they name stick out on both sides.
    wide = max(drawing.side * x, _CHAR * len(_label_text(drawing.axes[0])))
    tall = max(drawing.side * y, _CHAR * len(_label_text(drawing.axes[1])))
    box = (-left, back[1] - 4, left + wide + back[0] + right, tall - back[1] + 8 + _LABEL)
    return el(
        "svg",
        el("title", title),
        join_html(_draw_faces(drawing)),
        highlights,
        join_html(_draw_numbers(drawing)),
        join_html(_draw_labels(drawing)),
        viewBox=" ".join(f"{v:.4g}" for v in box),
        width=f"{box[2]:.0f}",
        height=f"{box[3]:.0f}",
        role="img",
    )


def _draw_faces(drawing: _Drawing) -> list[Html]:
    """Draw the squares of the front, and of a block's top and right side."""
    return [
        el("path", d=outline, class_="sheet") for outline in _outline_visible(drawing, drawing.box)
    ] + [el("path", d=_grid_path(drawing), class_="lines")]


def _outline_visible(drawing: _Drawing, box: Box) -> list[str]:
    """Outline the visible faces of the squares from the front upper left corner to `box`."""
    x, y, z = box
    corners = [[(0, 0, 0), (x, 0, 0), (x, y, 0), (0, y, 0)]]
    if not drawing.flat:
        corners.append([(0, 0, 0), (x, 0, 0), (x, 0, z), (0, 0, z)])
        if x == drawing.box[0]:
            corners.append([(x, 0, 0), (x, y, 0), (x, y, z), (x, 0, z)])
    return [
        _polyline_path([drawing.place_at(*corner) for corner in face]) + "Z" for face in corners
    ]


def _grid_path(drawing: _Drawing) -> str:
    x, y, z = drawing.box
    z = 0 if drawing.flat else z
    bent = [[(i, y, 0), (i, 0, 0), (i, 0, z)] for i in range(1, x)]  # up the front, over the top
    bent += [[(0, j, 0), (x, j, 0), (x, j, z)] for j in range(1, y)]
    bent += [[(0, 0, k), (x, 0, k), (x, y, k)] for k in range(1, z)]
    return "".join(_polyline_path([drawing.place_at(*point) for point in line]) for line in bent)


def _polyline_path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _draw_highlights(drawing: _Drawing, sets: _Sets, first: int) -> Html:
    """Draw the group of the first device along each set of axes; only one is visible."""
    shapes = []
    for number, axes in sets.items():
        x, y, z = (axis.squares if axis and axis.name in axes else 1 for axis in drawing.axes)
        faces = (el("path", d=outline) for outline in _outline_visible(drawing, (x, y, z)))
        shown = "group on" if number == first else "group"
        shapes.append(el("g", *faces, class_=shown, data_g=number))
    return join_html(shapes)


def _draw_numbers(drawing: _Drawing) -> list[Html]:
    x, y, _ = drawing.box
    whole = all(axis is None or axis.step == 1 for axis in drawing.axes)
    if not drawing.flat or not whole or x * y > _NUMBERED or drawing.side < 20:
        return []
    places = [(i, j, drawing.place_at(i + 0.5, j + 0.5)) for j in range(y) for i in range(x)]
    return [
        el("text", j * x + i, x=f"{point[0]:.1f}", y=f"{point[1] + 4:.1f}", text_anchor="middle")
        for i, j, point in places
    ]


def _label_text(axis: _Axis | None) -> str:
    return f"{cut_middle(axis.name, 20)} {axis.size:,}" if axis else ""


def _draw_labels(drawing: _Drawing) -> list[Html]:
    x, y, z = drawing.box
    right, down, back = drawing.axes
    labels = []
    if right:
        point = drawing.place_at(x / 2, y)
        centre = max(point[0], _CHAR * len(_label_text(right)) / 2)
        labels.append(_draw_label(right, centre, point[1] + 15, text_anchor="middle"))
    if down:
        point = drawing.place_at(0, y / 2)
        centre = max(point[1], _CHAR * len(_label_text(down)) / 2)
        turned = {"text_anchor": "middle", "transform": f"rotate(-90 -7 {centre:.1f})"}
        labels.append(_draw_label(down, -7, centre, **turned))
    if back:
        point = drawing.place_at(x, y, z / 2)
        labels.append(_draw_label(back, point[0] + 8, point[1] + 8))
    return labels


def _draw_label(axis: _Axis, x: float, y: float, **attributes: object) -> Html:
    return el("text", _label_text(axis), x=f"{x:.1f}", y=f"{y:.1f}", class_="axis", **attributes)


def _legend_lines(axes: Sequence[_Axis]) -> list[str]:
    steps = [f"{axis.step} along {axis.name}" for axis in axes if axis.step > 1]
    more = [f"{axis.size:,} along {axis.name}" for axis in axes[:-3]]
    lines = []
    if steps:
        lines.append(f"One square is several devices: {', '.join(steps)}.")
    if more:
        lines.append(f"The block is there once for each of {' × '.join(more)}.")
    return [*lines, "Lit up is the first group; devices are counted by their place in the mesh."]


def _find_busiest(report: Findings, sets: _Sets) -> int:
    sent: Counter[AxisSet] = Counter()
    for row in report.collectives:
        sent[row.axes] += row.wire_bytes * row.trips
    return max(sets, key=lambda number: sent[sets[number]])


def _groups_list(mesh: Sequence[tuple[str, int]], sets: _Sets, first: int) -> Html:
    known = dict(mesh)
    items = []
    for number, axes in sets.items():
        size = math.prod(known[name] for name in axes)
        groups = math.prod(known.values()) // size
        number_of = "1 group" if groups == 1 else f"{groups:,} groups"
        name = el(
            "button",
            name_axes(axes),
            type="button",
            data_g=number,
            aria_pressed="true" if number == first else "false",
        )
        first_of = f" {number_of} of {size:,}: {_name_members(mesh, axes)}"
        items.append(el("li", name, el("span", first_of)))
    return el("ul", *items, class_="groups")


def _name_members(mesh: Sequence[tuple[str, int]], axes: Sequence[str]) -> str:
    """Name the members of the first group along some axes, by place in the mesh.

    Only the named few are computed: there may be a billion.
    """
    stride, along = 1, []  # size and stride of each of the axes, the minor one first
    for name, size in reversed(mesh):
        if name in axes:
            along.append((size, stride))
        stride *= size
    size = math.prod(size for size, _ in along)
    few = [str(_place_of_member(number, along)) for number in range(min(size, 4))]
    last = str(_place_of_member(size - 1, along))
    return ", ".join(few) if last in few else f"{', '.join(few[:3])}, …, {last}"


def _place_of_member(number: int, along: Sequence[tuple[int, int]]) -> int:
    place = 0
    for size, stride in along:
        number, step = divmod(number, size)
        place += step * stride
    return place
