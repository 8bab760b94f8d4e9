"""Show a report in a notebook, with markup that fetches nothing and runs nothing."""

import html

from txcore.profiling.report.html import markup


def frame_page(page: str, title: str) -> str:
    """Write a whole page into a frame that keeps it apart from the notebook.

    The frame is sandboxed: no script runs in it, and its styles do not leave it.

    Args:
      page: an HTML document.
      title: its description for screen readers.

    Returns:
      An iframe element.
    """
    style = "width: 100%; height: 40em; border: 1px solid #8888"
    source = markup.Html(html.escape(page))
    return markup.el("iframe", sandbox=True, srcdoc=source, title=title, style=style)


def write_lines(text: str) -> str:
    r"""Write text line by line in letters of one width, escaped.

    Example:
      >>> write_lines("a < b\n\n\x1b[31m")
      '<pre>a &lt; b\n\n\\x1b[31m</pre>'
    """
    escaped = (markup.escape_text(line) for line in text.split("\n"))
    return markup.el("pre", markup.Html("\n".join(escaped)))
