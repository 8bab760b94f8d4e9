"""Draw the bytes per set of axes and kind of collective as bars."""

from collections import defaultdict
from collections.abc import Sequence

from txcore.profiling.report.findings import Findings
from txcore.profiling.report.html.figures import (
    AxisSet,
    format_number,
    format_size,
    make_badge,
    name_axes,
)
from txcore.profiling.report.html.markup import Html, el, join_html
from txcore.profiling.report.rows import Collective


def traffic_section(report: Findings) -> Html:
    """Show the bytes of one call over each set of axes by each kind of collective.

    Args:
      report: any report.

    Returns:
      The section: the busiest axes first; all bars have one scale.
    """
    title = el("h2", "Bytes per axis and kind")
    if not report.collectives:
        return el("section", title, el("p", "Nothing is sent.", class_="quiet"))
    by_axes: dict[AxisSet, dict[str, list[Collective]]] = defaultdict(lambda: defaultdict(list))
    for row in report.collectives:
        by_axes[row.axes][row.kind].append(row)
    cells = [rows for kinds in by_axes.values() for rows in kinds.values()]
    longest = max(max(_sum_payload(rows), _sum_wire(rows)) for rows in cells) or 1
    busiest = sorted(by_axes.items(), key=lambda item: -sum(map(_sum_wire, item[1].values())))
    head = el(
        "tr",
        *(el("th", name, scope="col") for name in ("Axes", "Kind", "Ops")),
        el("th", el("i", class_="swatch payload"), "Payload", scope="col"),
        el("th", el("i", class_="swatch wire"), "Wire", scope="col"),
        el("td"),
    )
    return el(
        "section",
        title,
        el("p", "In one call of the program; wire is what each device sends.", class_="quiet"),
        el(
            "table",
            el("thead", head),
            *(_axes_body(axes, kinds, longest) for axes, kinds in busiest),
            class_="traffic",
        ),
    )


def _axes_body(axes: AxisSet, kinds: dict[str, list[Collective]], longest: int) -> Html:
    ordered = sorted(kinds.items(), key=lambda item: -_sum_wire(item[1]))
    name = el("th", name_axes(axes), rowspan=len(ordered), scope="rowgroup")
    lines = []
    for place, (kind, rows) in enumerate(ordered):
        unexplained = [row for row in rows if not row.explained]
        mark = make_badge(f"✕ {len(unexplained)} unexplained", "bad") if unexplained else None
        lines.append(
            el(
                "tr",
                name if place == 0 else None,
                el("td", kind, " " if mark else None, mark),
                el("td", format_number(len(rows))),
                el("td", format_size(_sum_payload(rows), at_least=not _all_known(rows))),
                el("td", format_size(_sum_wire(rows), at_least=not _all_known(rows))),
                el(
                    "td",
                    _draw_bars(
                        _sum_payload(rows), _sum_wire(rows), _sum_wire(unexplained), longest
                    ),
                ),
            )
        )
    return el("tbody", *lines)


def _draw_bars(payload: int, wire: int, unexplained: int, longest: int) -> Html:
    """Draw the payload above the wire bytes; unexplained bytes are the end of that bar."""
    explained = wire - unexplained
    bars = [
        _draw_bar("payload", 0, payload / longest, 0),
        _draw_bar("wire", 0, explained / longest, 9),
        _draw_bar("bad", explained / longest, unexplained / longest, 9),
    ]
    return el("svg", join_html(bars), class_="bars", width="100%", height=16, aria_hidden="true")


def _draw_bar(name: str, start: float, length: float, top: int) -> Html | None:
    if not length:
        return None
    # A bar stays visible beside one that is a million times longer.
    width = f"{max(100 * length, 0.5):.2f}%"
    return el("rect", class_=name, x=f"{100 * start:.2f}%", width=width, y=top, height=7)


def _all_known(rows: Sequence[Collective]) -> bool:
    return all(row.trips_known and row.wire_known for row in rows)


def _sum_payload(rows: Sequence[Collective]) -> int:
    return sum(row.payload_bytes * row.trips for row in rows)


def _sum_wire(rows: Sequence[Collective]) -> int:
    return sum(row.wire_bytes * row.trips for row in rows)
