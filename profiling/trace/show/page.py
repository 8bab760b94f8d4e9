"""Write a trace as one self-contained HTML page: tables, steps as bars, and a step's timeline."""

import os
from collections.abc import Iterable, Sequence

from txcore.profiling.report.html.figures import format_size
from txcore.profiling.report.html.markup import Html, el, join_html
from txcore.profiling.report.html.page import make_page, read_asset, replace_page
from txcore.profiling.report.html.rows import origin_badge
from txcore.profiling.trace.figures import CollectiveTime
from txcore.profiling.trace.show.table import format_time, say_straggler, write_verdict
from txcore.profiling.trace.show.timeline import Lane, choose_step, draw_lanes
from txcore.profiling.trace.steps import Step
from txcore.profiling.trace.trace_model import TraceModel

_TITLE = "What ran: collectives and steps"
_PARTS = ("compute", "exposed", "input", "host", "idle")
_TEXT = ("origin", "parts", "tags, source", "op_name, source")  # columns that are no figures
_MOST_STEPS, _MOST_OPERATIONS = 60, 20
_WIDTH = 1000  # of a lane's own coordinates, whatever its width on the screen
# Colours of the kinds of time; the house's own where it has one that means the same.
_STYLE = """
:root { --waiting: #c9b38a; --host: #8c7fb8; --idle: #dde2e8; }
@media (prefers-color-scheme: dark) {
  :root { --waiting: #6d5a35; --host: #8577b5; --idle: #323a43; }
}
.k-compute { fill: var(--payload); background: var(--payload); }
.k-hidden { fill: var(--wire); background: var(--wire); }
.k-exposed, .k-collective { fill: var(--group); background: var(--group); }
.k-waiting { fill: var(--waiting); background: var(--waiting); }
.k-input { fill: var(--good); background: var(--good); }
.k-host { fill: var(--host); background: var(--host); }
.k-idle { fill: var(--idle); background: var(--idle); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 10px; padding: 0; }
.legend li { list-style: none; }
.lane { display: grid; grid-template-columns: 8.5em minmax(0, 1fr); gap: 0 10px; }
.lane { align-items: center; margin: 3px 0; }
.lane svg { display: block; width: 100%; height: 20px; background: var(--panel); }
.lane span { color: var(--quiet); font-size: 12.5px; }
.ticks { display: flex; justify-content: space-between; }
.scroll { overflow-x: auto; }
.scroll td, .scroll th { white-space: nowrap; }
.scroll td:last-child { white-space: normal; min-width: 20em; }
.figures :is(td, th):not(:first-child):not(.text) { text-align: right; }
.figures .source { padding: 0; }
.bar svg { display: block; width: 100%; min-width: 120px; height: 14px; }
@media (max-width: 600px) { .lane { grid-template-columns: 5.5em minmax(0, 1fr); } }
"""


def to_page(trace: TraceModel, *, title: str = _TITLE) -> str:
    """Write a trace as one HTML page: nothing is fetched, no script, light and dark.

    Args:
      trace: what to show. Every text of it is escaped.
      title: the page's heading.

    Returns:
      The page.
    """
    body = (
        el("header", el("h1", title), _verdict_banner(trace), _facts_list(trace)),
        el(
            "main",
            _notes_section(trace),
            _timeline_section(trace),
            _steps_section(trace.steps),
            _collectives_section(trace.collectives),
            _operations_section(trace),
        ),
        _make_footer(),
    )
    return make_page(title, body, read_asset("style.css") + _STYLE)


def write_page(trace: TraceModel, path: str | os.PathLike[str]) -> None:
    """Write a trace's page into a file, which is replaced whole or stays as it is.

    Raises:
      OSError: it cannot be written.
    """
    replace_page(to_page(trace), path)


def _verdict_banner(trace: TraceModel) -> Html:
    name, icon, label = ("good", "✓", "Declared") if trace.ok else ("bad", "✕", "Not declared")
    if trace.ok and not trace.checked:
        name, icon, label = "warn", "?", "Declared, not compared"
    said = el("div", el("strong", label), el("p", write_verdict(trace)))
    icon_ = el("span", icon, class_="icon", aria_hidden="true")
    return el("div", icon_, said, class_=f"verdict {name}", role="status")


def _facts_list(trace: TraceModel) -> Html:
    numbers = {step.number for step in trace.steps}
    facts = [
        ("Devices", f"{len(trace.devices)} {trace.platform}"),
        ("Ranks", str(len({rank for rank, _ in trace.devices}))),
        ("Step's program", trace.program or "none"),
        ("Steps", str(len(numbers))),
        ("Events joined", f"{trace.joined[0]:,} of {trace.joined[1]:,}"),
        ("Stragglers", str(len(trace.stragglers))),
    ]
    return el("dl", *(el("div", el("dt", name), el("dd", fact)) for name, fact in facts))


def _notes_section(trace: TraceModel) -> Html | None:
    said = [f"Straggler: {say_straggler(s)}" for s in trace.stragglers] + [*trace.notes]
    if not said:
        return None
    items = (el("li", line) for line in said)
    return el("section", el("h2", "Stragglers and notes"), el("ul", *items))


def _timeline_section(trace: TraceModel) -> Html | None:
    chosen = choose_step(trace.steps)
    if chosen is None:
        return None
    number, window = chosen
    lanes = draw_lanes(trace, window, _WIDTH)
    took = window[1] - window[0]
    ticks = (el("span", format_time(took * part / 4)) for part in range(5))
    return el(
        "section",
        el("h2", f"Timeline of step {number}"),
        _legend(("compute", "collective", "waiting", "input", "host")),
        *(_lane_row(lane, took) for lane in lanes),
        el("div", el("span"), el("div", *ticks, class_="ticks"), class_="lane"),
        el("p", "Pieces closer than a pixel are drawn as one.", class_="quiet"),
    )


def _lane_row(lane: Lane, took: int) -> Html:
    pieces = join_html(
        el(
            "rect",
            el("title", title) if title else None,
            x=f"{start:.5g}",
            y=0,
            width=f"{end - start:.4g}",
            height=20,
            class_=f"k-{kind}",
        )
        for kind, start, end, title in lane.pieces
    )
    drawing = el(
        "svg",
        el("title", f"{lane.name}: {format_time(took)} from left to right"),
        pieces,
        viewBox=f"0 0 {_WIDTH} 20",
        preserveAspectRatio="none",
        role="img",
    )
    return el("div", el("span", lane.name), drawing, class_="lane")


def _legend(kinds: Iterable[str]) -> Html:
    items = (
        el("li", el("span", class_=f"swatch k-{kind}", aria_hidden="true"), kind) for kind in kinds
    )
    return el("ul", *items, class_="legend")


def _steps_section(steps: Sequence[Step]) -> Html | None:
    numbers = sorted({step.number for step in steps})
    if not numbers:
        return None
    longest = max(step.end - step.start for step in steps)
    rows = [_step_row(step, longest) for step in steps if step.number in set(numbers[:_MOST_STEPS])]
    head = ("step", "time", *_PARTS, "hidden", "waiting")
    more = len(numbers) - _MOST_STEPS
    return el(
        "section",
        el("h2", "Steps"),
        _legend(_PARTS),
        el(
            "div",
            el(
                "table",
                el("thead", _head_row((*head, "parts"))),
                el("tbody", *rows),
                class_="figures",
            ),
            class_="scroll",
            tabindex=0,
            role="region",
            aria_label="Steps",
        ),
        el("p", f"and {more} steps more", class_="quiet") if more > 0 else None,
    )


def _head_row(names: Iterable[str]) -> Html:
    kinds = ((name, "text" if name in _TEXT else None) for name in names)
    return el("tr", *(el("th", name, scope="col", class_=kind) for name, kind in kinds))


def _step_row(step: Step, longest: int) -> Html:
    parts = [getattr(step, part) for part in _PARTS]
    cells = [step.end - step.start, *parts, step.hidden, step.waiting]
    bars, at = [], 0.0
    for kind, took in zip(_PARTS, parts, strict=True):
        width = took / longest * _WIDTH if longest else 0.0
        place = {"x": f"{at:.5g}", "y": 0, "width": f"{width:.4g}", "height": 14}
        bars.append(el("rect", class_=f"k-{kind}", **place))
        at += width
    drawing = el(
        "svg",
        el("title", f"step {step.number}: " + _say_parts(step)),
        *bars,
        viewBox=f"0 0 {_WIDTH} 14",
        preserveAspectRatio="none",
        role="img",
    )
    name = f"{step.number}, rank {step.rank} device {step.device}"
    figures = (el("td", format_time(cell)) for cell in cells)
    return el("tr", el("th", name, scope="row"), *figures, el("td", drawing, class_="bar text"))


def _say_parts(step: Step) -> str:
    return ", ".join(f"{part} {format_time(getattr(step, part))}" for part in _PARTS)


def _collectives_section(collectives: Sequence[CollectiveTime]) -> Html | None:
    if not collectives:
        return None
    head = _head_row(
        (
            *("kind", "axes", "n", "calls", "a call", "waiting", "moving", "bus GB/s", "of best"),
            *("sent a run", "audit", "origin", "tags, source"),
        )
    )
    rows = (_collective_row(c) for c in collectives)
    table = el("table", el("thead", head), el("tbody", *rows), class_="figures")
    region = el("div", table, class_="scroll", tabindex=0, role="region", aria_label="Collectives")
    return el("section", el("h2", "Collectives"), region)


def _collective_row(c: CollectiveTime) -> Html:
    row, calls = c.row, max(c.calls, 1)
    figures = (
        " + ".join(row.axes) or "–",
        str(row.group_size or "?"),
        f"{c.calls:,}",
        format_time(c.total / calls),
        "?" if c.waiting is None else format_time(c.waiting / calls),
        "?" if c.moving is None else format_time(c.moving / calls),
        f"{c.bus_bandwidth / 1e9:.3g}" if c.bus_bandwidth else "?",
        f"{c.bus_bandwidth / c.best:.0%}" if c.best and c.bus_bandwidth else "–",
        format_size(c.measured_bytes),
        format_size(c.predicted_bytes, at_least=not row.trips_known),
    )
    named = join_html((el("code", tag) for tag in row.tags or (row.op,)), " ")
    where = el("span", row.source or "source unknown", class_="source")
    return el(
        "tr",
        el("th", row.kind, scope="row"),
        *(el("td", figure) for figure in figures),
        el("td", origin_badge(row.origin, row.explained), class_="text"),
        el("td", named, where, class_="text"),
        class_=None if row.explained else "bad",
    )


def _operations_section(trace: TraceModel) -> Html | None:
    shown = trace.operations[:_MOST_OPERATIONS]
    if not shown:
        return None
    head = _head_row(("operation", "calls", "a call", "total", "op_name, source"))
    rows = (
        el(
            "tr",
            el("th", el("code", o.op), scope="row"),
            el("td", f"{o.calls:,}"),
            el("td", format_time(o.total / o.calls)),
            el("td", format_time(o.total)),
            el("td", el("code", o.op_name), el("span", o.source, class_="source"), class_="text"),
        )
        for o in shown
    )
    table = el("table", el("thead", head), el("tbody", *rows), class_="figures")
    region = el("div", table, class_="scroll", tabindex=0, role="region", aria_label="Operations")
    return el("section", el("h2", "Operations that are no collectives"), region)


def _make_footer() -> Html:
    words = (
        "A step ends where a run of the step's program ends on its device. Each moment of it is "
        "one thing: compute where any operation runs that is no collective, else exposed "
        "communication, else input or host where the host is seen at that, else idle. Hidden is "
        "communication while something computes; it is part of compute here. Waiting is the time "
        "of a collective until the last device of its group arrived. The bus bandwidth is that of "
        "the fastest device, of the median execution, as nccl-tests define it."
    )
    return el("footer", el("details", el("summary", "What the words mean"), el("p", words)))
