"""Show the compiled collectives in a table, with their arrays to unfold."""

from collections import Counter
from collections.abc import Sequence

from txcore.profiling.report.findings import Findings
from txcore.profiling.report.html.figures import (
    axis_sets,
    format_number,
    format_size,
    make_badge,
    name_axes,
    name_dtypes,
    tag_list,
)
from txcore.profiling.report.html.markup import Html, el, join_html, make_head_row
from txcore.profiling.report.numbers import format_count
from txcore.profiling.report.rows import Collective, Part

_HEAD = (
    *("#", "Kind", "Axes", "n", "Dtype", "Payload", "Wire", "Trips", "Wire a call", "Origin"),
    "Tags, source",
)
_TAGS_SHOWN = 2
_INEXACT = ("autodiff", "opaque")


def rows_section(report: Findings) -> Html:
    """Show every compiled collective, the unexplained ones first.

    Args:
      report: any report.

    Returns:
      The section; "" where the program has no collective.
    """
    if not report.collectives:
        return Html("")
    numbered = sorted(enumerate(report.collectives), key=lambda item: item[1].explained)
    sets = {axes: number for number, axes in enumerate(axis_sets(report))}
    head = make_head_row(_HEAD)
    return el(
        "section",
        el("h2", "Collectives"),
        _filter_form(report.collectives, sets),
        el(
            "table",
            el("thead", head),
            *(_collective_body(number, row, sets[row.axes]) for number, row in numbered),
            class_="rows cards",
        ),
    )


def _filter_form(rows: Sequence[Collective], sets: dict[tuple[str, ...], int]) -> Html:
    """Write the controls, hidden until the page's script can serve them."""
    origins = Counter(row.origin for row in rows)
    over_axes = Counter(row.axes for row in rows)
    unexplained = sum(not row.explained for row in rows)
    by_origin = [(name, name, number) for name, number in sorted(origins.items())]
    if unexplained:
        by_origin.insert(0, ("!", "unexplained", unexplained))
    by_axes = [
        (str(sets[axes]), name_axes(axes), number) for axes, number in sorted(over_axes.items())
    ]
    return el(
        "form",
        _select_control("Origin", "origin", len(rows), by_origin),
        _select_control("Axes", "axes", len(rows), by_axes),
        el("label", "Find ", el("input", type="search", name="find", autocomplete="off")),
        el("output", role="status"),
        class_="filters",
        hidden=True,
    )


def _select_control(label: str, name: str, total: int, options: list[tuple[str, str, int]]) -> Html:
    choices = [el("option", f"all ({total:,})", value="")]
    choices += [el("option", f"{shown} ({n:,})", value=value) for value, shown, n in options]
    return el("label", f"{label} ", el("select", *choices, name=name))


def _collective_body(number: int, row: Collective, axes: int) -> Html:
    cells = (
        format_number(number + 1),
        row.kind,
        " + ".join(row.axes) or "–",
        format_number(row.group_size) if row.group_size else "?",
        name_dtypes(row.dtype, row.wire_dtype),
        format_size(row.payload_bytes, known=row.payload_known),
        format_size(row.wire_bytes, known=row.wire_known),
        format_number(row.trips, at_least=not row.trips_known),
        format_size(row.wire_bytes * row.trips, at_least=not row.trips_known, known=row.wire_known),
        origin_badge(row.origin, row.explained),
        _names_cell(row),
    )
    return el(
        "tbody",
        el("tr", *(el("td", cell) for cell in cells)),
        el("tr", el("td", *_more_facts(row), colspan=len(cells)), class_="more"),
        id=f"r{number + 1}",
        class_=None if row.explained else "bad",
        data_g=axes,
        data_o=row.origin,
    )


def origin_badge(origin: str, explained: bool) -> Html:
    """Name an origin, marked where nobody asked for it or the proof cannot see through it."""
    if not explained:
        return make_badge(f"✕ {origin}", "bad")
    return make_badge(f"! {origin}", "warn") if origin in _INEXACT else make_badge(origin)


def _names_cell(row: Collective) -> Html:
    """Write a row's tags, source and note; the first line unfolds the rest."""
    shown = tag_list(row.tags[:_TAGS_SHOWN])
    more = len(row.tags) - _TAGS_SHOWN
    name = shown or el("span", row.op_name.rpartition("/")[2] or "no tag", class_="quiet")
    and_more = el("span", f"and {more} more", class_="quiet") if more > 0 else None
    return join_html(
        [
            el("details", el("summary", name, and_more)),
            el("span", row.source or "source unknown", class_="source"),
            el("span", row.note, class_="note") if row.note else None,
        ]
    )


def _more_facts(row: Collective) -> list[Html]:
    facts: list[tuple[str, object]] = [("HLO", row.op), ("op_name", row.op_name)]
    if len(row.parts) == 1:  # all else of it is the row's own
        (part,) = row.parts
        facts += [("elements", format_count(part.elements)), ("fates", ", ".join(part.fates))]
    if not row.parts and len(row.tags) > _TAGS_SHOWN:
        facts.append(("tags", tag_list(row.tags)))
    listed = [join_html([el("dt", name), el("dd", fact)]) for name, fact in facts if fact]
    parts = [_parts_table(row.parts)] if len(row.parts) > 1 else []
    return [el("dl", *listed), *parts]


def _parts_table(parts: Sequence[Part]) -> Html:
    head = ("Tag", "Dtype", "Elements", "Payload", "Source", "Fates")
    lines = [
        el(
            "tr",
            el("td", el("code", part.tag) if part.tag else "–"),
            el("td", name_dtypes(part.dtype, part.wire_dtype)),
            el("td", format_number(part.elements)),
            el("td", format_size(part.payload_bytes)),
            el("td", part.source or "–"),
            el("td", ", ".join(part.fates) or "–"),
        )
        for part in parts
    ]
    heads = el("tr", *(el("th", name) for name in head))
    return el("table", el("thead", heads), el("tbody", *lines), class_="parts", tabindex=0)
