"""Write figures and short names for all sections of the page."""

from collections.abc import Sequence

from txcore.profiling.report.findings import Findings
from txcore.profiling.report.html.markup import Html, el, escape_text, join_html
from txcore.profiling.report.numbers import MOST, format_bytes, format_count

AxisSet = tuple[str, ...]


def format_size(number: int, *, at_least: bool = False, known: bool = True) -> Html:
    """Write bytes for people, with the exact number for sorting and for the pointer."""
    return _data_element(format_bytes(number), number, at_least) if known else escape_text("?")


def format_number(number: int, *, at_least: bool = False) -> Html:
    """Write a number with its thousands apart, and plain for sorting where that differs."""
    return _data_element(format_count(number), number, at_least)


def _data_element(shown: str, number: int, at_least: bool) -> Html:
    shown = f"≥ {shown}" if at_least else shown
    return (
        escape_text(shown)
        if shown == str(number)
        else el("data", shown, value=min(number, MOST + 1))
    )


def name_dtypes(declared: str, wire: str) -> str:
    """Name a dtype, and what it travels as where that is another one."""
    return declared if declared == wire else f"{declared} → {wire}"


def name_axes(axes: Sequence[str]) -> str:
    """Name a set of axes."""
    return " + ".join(axes) or "no mesh axis"


def tag_list(tags: Sequence[str]) -> Html:
    """Write tags one after another."""
    return join_html((el("code", tag) for tag in tags), " ")


def make_badge(label: str, kind: str = "") -> Html:
    """Write a short word in a frame; `kind` is "bad", "good" or "warn"."""
    return el("span", label, class_=f"badge {kind}".strip())


def axis_sets(report: Findings) -> tuple[AxisSet, ...]:
    """List each axis of the mesh, then the other sets of axes that the rows talk over."""
    single = [(name,) for name, _ in report.mesh]
    return tuple(dict.fromkeys([*single, *sorted({c.axes for c in report.collectives})]))
