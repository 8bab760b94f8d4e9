"""Show hangs and false types, and an engine's plan."""

from txcore.profiling.report.findings import Findings
from txcore.profiling.report.html.figures import format_size, make_badge, name_axes
from txcore.profiling.report.html.markup import Html, el, make_head_row
from txcore.profiling.report.rows import PlanLine

_PROBLEMS = {"hangs": "✕ hangs", "lies": "✕ false type"}
_HEAD = ("What", "Kind", "Axes", "Dtype", "Predicted", "Found", "Eliminated", "")


def divergent_section(report: Findings) -> Html:
    """Show collectives that not all devices reach and outputs of a false type; "" without any.

    Args:
      report: any report.

    Returns:
      The section.
    """
    if not report.divergent:
        return Html("")
    items = (
        el("li", make_badge(_PROBLEMS.get(found.problem, found.problem), "bad"), " ", str(found))
        for found in report.divergent
    )
    return el("section", el("h2", "Under a predicate that differs"), el("ul", *items), id="hangs")


def plan_section(report: Findings) -> Html:
    """Compare the plan with the program; "" without a plan.

    Args:
      report: any report.

    Returns:
      The section.
    """
    if not report.plan:
        return Html("")
    heads = make_head_row(_HEAD)
    return el(
        "section",
        el("h2", "What the plan predicts"),
        el("p", "Payload of one call.", class_="quiet"),
        el(
            "table",
            el("thead", heads),
            el("tbody", *map(_plan_row, report.plan)),
            class_="plan cards",
        ),
        id="plan",
    )


def _plan_row(line: PlanLine) -> Html:
    if not line.ok:
        state = make_badge("✕ a sum" if line.is_there else "✕ short", "bad")
    elif line.times > 1:
        state = make_badge(f"{line.times} times, in a loop")
    elif line.factor == "not read":
        state = make_badge("factor not read")
    else:
        state = (
            make_badge("✓ as predicted", "good")
            if line.payload_bytes
            else make_badge("beyond the plan")
        )
    cells = (
        line.what,
        line.kind,
        name_axes(line.axes),
        line.dtype,
        format_size(line.payload_bytes),
        format_size(line.found_bytes),
        format_size(line.eliminated_bytes),
        state,
    )
    return el("tr", *(el("td", cell) for cell in cells))
