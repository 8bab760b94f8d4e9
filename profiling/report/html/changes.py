"""Show the changes since an earlier report."""

from collections.abc import Sequence

from txcore.profiling.report.diff import Amount, Change, format_signed, summary
from txcore.profiling.report.findings import Findings
from txcore.profiling.report.html.figures import format_size, make_badge, name_axes
from txcore.profiling.report.html.markup import Html, el, join_html, make_head_row
from txcore.profiling.report.html.rows import origin_badge
from txcore.profiling.report.verdict import write_verdict

_PLACES = 4
_BADGES = {
    "added": ("+ added", "warn"),
    "removed": ("− removed", ""),
    "grown": ("▲ grown", "warn"),
    "shrunk": ("▼ shrunk", ""),
    "same": ("= same", ""),
}


def changes_section(before: Findings, after: Findings, changes: Sequence[Change]) -> Html:
    """Show the changes between two reports.

    Args:
      before: the earlier report.
      after: the report of the page.
      changes: from `diff`.

    Returns:
      The section; unchanged rows are folded away.
    """
    changed = [c for c in changes if c.change != "same"]
    same = [c for c in changes if c.change == "same"]
    place = f" ({before.target})" if before.target not in ("", after.target) else ""
    return el(
        "section",
        el("h2", "Changes"),
        el("p", summary(changes).replace("->", "→")),
        el("dl", el("dt", f"Before{place}"), el("dd", write_verdict(before))),
        _changes_table(changed) if changed else None,
        el("details", el("summary", f"{len(same):,} unchanged"), _changes_table(same))
        if same
        else None,
        id="changes",
    )


def _changes_table(changes: Sequence[Change]) -> Html:
    above = el(
        "tr",
        *(el("td") for _ in range(6)),
        el("th", "Payload a call", colspan=2, scope="colgroup"),
        el("th", "Wire a call", colspan=3, scope="colgroup"),
    )
    names = (
        *("Change", "Kind", "Axes", "Dtype", "Origin", "Tags or source"),
        *("before", "now", "before", "now", "change"),
    )
    heads = make_head_row(names)
    return el(
        "table",
        el("thead", above, heads),
        el("tbody", *map(_change_row, changes)),
        class_="changes cards",
    )


def _change_row(change: Change) -> Html:
    cells = (
        make_badge(*_BADGES[change.change]),
        change.kind,
        name_axes(change.axes),
        change.dtype,
        origin_badge(change.origin, change.explained),
        _name_cell(change),
        _bytes_cell(change.before, change.before.payload_bytes),
        _bytes_cell(change.after, change.after.payload_bytes),
        _bytes_cell(change.before, change.before.wire_bytes),
        _bytes_cell(change.after, change.after.wire_bytes),
        format_signed(change.wire_growth).replace("-", "−"),
    )
    return el("tr", *(el("td", cell) for cell in cells))


def _name_cell(change: Change) -> Html:
    """Write the tags, or the file, and the first places."""
    places = ", ".join(change.places[:_PLACES])
    more = len(change.places) - _PLACES
    where = f"{places} and {more} more" if more > 0 else places
    name = el("code", change.name.replace(",", ", "))
    return join_html([name, el("span", where, class_="source") if where else None])


def _bytes_cell(amount: Amount, number: int) -> Html | str:
    return format_size(number, at_least=amount.at_least) if amount.rows else "–"
