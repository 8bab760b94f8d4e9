"""Markup in which every text is escaped unless it is markup already."""

import html
from collections.abc import Iterable

from txcore.outside import printable

_VOID = ("input", "meta")


class Html(str):
    """Markup, to be written as it is; any other string is text, which `el` escapes."""

    __slots__ = ()


def escape_text(value: object) -> Html:
    r"""Escape a value, also invisible characters and those that would reorder the text.

    Example:
      >>> escape_text('<b title="\u202e">')
      '&lt;b title=&quot;\\u202e&quot;&gt;'
    """
    if isinstance(value, Html):
        return value
    return Html(html.escape(printable(str(value))))


def join_html(children: Iterable[object], between: str = "") -> Html:
    """Concatenate children; None and "" leave no trace."""
    return Html(between.join(escape_text(child) for child in children if child not in (None, "")))


def el(name: str, /, *children: object, **attributes: object) -> Html:
    """Write one element.

    Args:
      name: "td".
      *children: markup or texts; None is left out.
      **attributes: `class_="a"` is class="a", `data_axes=1` is data-axes="1"; True is written as
        a bare name, None and False not at all.

    Returns:
      The element.

    Example:
      >>> el("td", "a < b", el("i", class_="x", hidden=True), id=None)
      '<td>a &lt; b<i class="x" hidden></i></td>'
    """
    written = "".join(_write_attribute(key, value) for key, value in attributes.items())
    end = "" if name in _VOID else f"</{name}>"
    return Html(f"<{name}{written}>{join_html(children)}{end}")


def make_head_row(names: Iterable[str]) -> Html:
    """Write the row of a table's column heads."""
    return el("tr", *(el("th", name, scope="col") if name else el("td") for name in names))


def _write_attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    key = key.rstrip("_").replace("_", "-")
    return f" {key}" if value is True else f' {key}="{escape_text(value)}"'
