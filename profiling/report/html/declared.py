"""Show the declared collectives: the missing ones, and the fates of all."""

from collections import Counter

from txcore.profiling.declared.collectives import Declared
from txcore.profiling.report.findings import Findings
from txcore.profiling.report.html.figures import format_number, format_size, make_badge, name_axes
from txcore.profiling.report.html.markup import Html, el, escape_text, join_html, make_head_row
from txcore.profiling.report.rows import Fate

_HEAD = ("Tag", "Primitive", "Axes", "n", "Dtype", "Payload", "Trips", "Source")
_OPEN = 20  # fates up to which they are shown at once


def missing_section(report: Findings) -> Html:
    """Show the collectives that are declared but not compiled; "" where there is none.

    Args:
      report: any report.

    Returns:
      The section.
    """
    if not report.missing:
        return Html("")
    heads = make_head_row(_HEAD)
    lines = (el("tr", *(el("td", cell) for cell in _declared_cells(d))) for d in report.missing)
    return el(
        "section",
        el("h2", "Declared but missing"),
        el("p", "The traced program asks for these; the compiled one lacks them.", class_="quiet"),
        el("table", el("thead", heads), el("tbody", *lines, class_="bad"), class_="declared cards"),
        id="missing",
    )


def fates_section(report: Findings) -> Html:
    """Show the fate of each declared operand; "" where the report has none.

    Args:
      report: any report.

    Returns:
      The section.
    """
    if not report.fates:
        return Html("")
    counts = Counter(", ".join(fate.fates) or "unknown" for fate in report.fates)
    summary = " · ".join(f"{number:,} {fates}" for fates, number in counts.most_common())
    heads = make_head_row((*_HEAD, "Fates", "Row"))
    table = el(
        "table",
        el("thead", heads),
        el("tbody", *map(_fate_row, report.fates)),
        class_="declared cards",
    )
    return el(
        "section",
        el("h2", "Fates of what is declared"),
        el("details", el("summary", summary), table, open=len(report.fates) <= _OPEN),
        id="fates",
    )


def _declared_cells(declared: Declared) -> tuple[object, ...]:
    return (
        el("code", declared.tag) if declared.tag else "–",
        declared.primitive,
        name_axes(declared.axes),
        format_number(declared.group_size),
        declared.dtype,
        format_size(declared.payload_bytes),
        format_number(declared.trips, at_least=not declared.trips_known),
        declared.source or "–",
    )


def _fate_row(fate: Fate) -> Html:
    names = (_fate_badge(name, fate.declared) for name in fate.fates)
    links = (el("a", row + 1, href=f"#r{row + 1}") for row in fate.rows)
    cells = (*_declared_cells(fate.declared), join_html(names, ", "), join_html(links, " ") or "–")
    return el("tr", *(el("td", cell) for cell in cells))


def _fate_badge(fate: str, declared: Declared) -> Html:
    """Write a fate, with a mark where it needs a look."""
    if fate == "missing":
        return make_badge("✕ missing", "bad")
    surprising = fate == "eliminated" and declared.live and not declared.foldable
    return make_badge("! eliminated", "warn") if surprising else escape_text(fate)
