"""Figures and short names as every section of the page writes them."""

from collections.abc import Sequence

from txcore.profiling.report.findings import Findings
from txcore.profiling.report.html.markup import Html, el, join, text
from txcore.profiling.report.numbers import MOST, format_bytes, format_count

AxisSet = tuple[str, ...]


def size(number: int, *, at_least: bool = False, known: bool = True) -> Html:
    """Write bytes for people, with the exact number for sorting and for the pointer."""
    return _data(format_bytes(number), number, at_least) if known else text("?")


def count(number: int, *, at_least: bool = False) -> Html:
    """Write a number with its thousands apart, and plain for sorting where that differs."""
    return _data(format_count(number), number, at_least)


def _data(shown: str, number: int, at_least: bool) -> Html:
    shown = f"≥ {shown}" if at_least else shown
    return text(shown) if shown == str(number) else el("data", shown, value=min(number, MOST + 1))


def dtypes(declared: str, wire: str) -> str:
    """Name a dtype, and what it travels as where that is another one."""
    return declared if declared == wire else f"{declared} → {wire}"


def over(axes: Sequence[str]) -> str:
    """Name a set of axes."""
    return " + ".join(axes) or "no mesh axis"


def tag_list(tags: Sequence[str]) -> Html:
    """Write tags one after another."""
    return join((el("code", tag) for tag in tags), " ")


def badge(label: str, kind: str = "") -> Html:
    """Write a short word in a frame; `kind` is "bad", "good" or "warn"."""
    return el("span", label, class_=f"badge {kind}".strip())


def axis_sets(report: Findings) -> tuple[AxisSet, ...]:
    """List each axis of the mesh, then the other sets of axes that the rows talk over."""
    single = [(name,) for name, _ in report.mesh]
    return tuple(dict.fromkeys([*single, *sorted({c.axes for c in report.collectives})]))
