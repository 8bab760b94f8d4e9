"""Write a report as one self-contained HTML page."""

import base64
import hashlib
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable
from importlib import resources

from txcore.profiling.declared.kernels import kernels_line
from txcore.profiling.report.diff import diff
from txcore.profiling.report.findings import Findings
from txcore.profiling.report.html.changes import changes_section
from txcore.profiling.report.html.declared import fates_section, missing_section
from txcore.profiling.report.html.markup import Html, el, join_html
from txcore.profiling.report.html.mesh import mesh_section
from txcore.profiling.report.html.plan import divergent_section, plan_section
from txcore.profiling.report.html.rows import rows_section
from txcore.profiling.report.html.traffic import traffic_section
from txcore.profiling.report.numbers import format_bytes
from txcore.profiling.report.verdict import write_verdict

# The colour, icon and label of each status.
_FACES = {
    "proved": ("good", "✓", "Proved"),
    "not proved": ("warn", "?", "Not proved"),
    "failed": ("bad", "✕", "Failed"),
}
_TITLE = "Collectives of the compiled program"
_ORIGINS = {
    "txcore": "asked for by a txcore collective; its tag says which",
    "user": "asked for by one of jax's own collectives",
    "autodiff": "made by jax's transposition of something that was asked for",
    "reshard": "asked for by name (jax.sharding.reshard)",
    "partitioner": "added by the compiler; nobody asked for it",
    "boundary": "added where an array enters or leaves a shard_map or jit with another sharding",
    "opaque": "a custom call that can communicate; nothing inside it can be read",
    "unknown": "looks like a collective and could not be read",
}


def to_html(report: Findings, other: Findings | None = None, *, title: str = _TITLE) -> str:
    """Write a report as one HTML page: no network, light and dark, readable without scripts.

    Args:
      report: what to show.
      other: an earlier report of the same program; the page then shows what changed since.
      title: the page's heading.

    Returns:
      The page. Every text of the report is escaped, and the page's own security policy forbids
      it to load or run anything that this function did not write.

    Raises:
      TypeError: `report` or `other` is no report.

    Example:
      >>> page = to_html(Findings(()), title="An <empty> program")
      >>> "<h1>An &lt;empty&gt; program</h1>" in page
      True
    """
    for given in (report,) if other is None else (report, other):
        if not isinstance(given, Findings):
            raise TypeError(
                f"to_html needs reports, but got a {type(given).__name__}: pass what audit or "
                "audit_text returned"
            )
    style, script = read_asset("style.css"), read_asset("script.js")
    body = (
        el("header", el("h1", title), _verdict_banner(report), _facts_list(report)),
        el(
            "main",
            changes_section(other, report, diff(other, report)) if other is not None else None,
            el("div", mesh_section(report), traffic_section(report), class_="side"),
            divergent_section(report),
            rows_section(report),
            missing_section(report),
            plan_section(report),
            fates_section(report),
        ),
        _make_footer(),
    )
    return make_page(title, body, style, script)


def make_page(title: str, body: Iterable[Html | None], style: str, script: str = "") -> str:
    """Write a whole page: a head with its own security policy, and a body.

    Args:
      title: of the browser's window.
      body: what is shown, in order.
      style, script: the only ones that the page's policy allows.
    """
    head = (
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_security_policy(style, script)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(style)),
    )
    last = el("script", Html(script)) if script else None
    page = el("html", el("head", *head), el("body", *body, last), lang="en")
    return f"<!doctype html>\n{page}\n"


def write_html(
    report: Findings, path: str | os.PathLike[str], other: Findings | None = None
) -> None:
    """Write a report's page into a file, which is replaced whole or stays as it is.

    Args:
      report, other: as for `to_html`.
      path: the file.

    Raises:
      FileNotFoundError: its folder does not exist.
      TypeError: as `to_html`.
    """
    replace_page(to_html(report, other), path)


def replace_page(page: str, path: str | os.PathLike[str]) -> None:
    """Write a page into a file, which is replaced whole or stays as it is.

    Raises:
      FileNotFoundError: its folder does not exist.
    """
    target = pathlib.Path(path).resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"an HTML report needs an existing folder to be written into, but {target.parent} is "
            "none: create it first"
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".report") as folder:
        whole = pathlib.Path(folder) / "page.html"
        whole.write_text(page, encoding="utf-8", newline="\n")
        whole.replace(target)


def read_asset(name: str) -> str:
    """Return the page's style.css or script.js."""
    file = resources.files("txcore.profiling.report.html").joinpath(name)
    return file.read_text(encoding="utf-8")


def _security_policy(style: str, script: str) -> str:
    """Allow the page's own style and script by their hashes, and nothing else."""
    return (
        f"default-src 'none'; style-src {_hash_source(style)}; script-src {_hash_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash_source(code: str) -> str:
    digest = hashlib.sha256(code.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _verdict_banner(report: Findings) -> Html:
    name, icon, label = _FACES[report.status]
    return el(
        "div",
        el("span", icon, class_="icon", aria_hidden="true"),
        el("div", el("strong", label), el("p", write_verdict(report))),
        class_=f"verdict {name}",
        role="status",
    )


def _facts_list(report: Findings) -> Html:
    devices = math.prod(size for _, size in report.mesh)
    mesh = " × ".join(f"{name} {size:,}" for name, size in report.mesh)
    at_least = "≥ " if report.at_least else ""
    facts = [
        ("Target", report.target or "unknown"),
        ("Mesh", mesh or "unknown"),
        ("Devices", f"{devices:,}" if report.mesh else "unknown"),
        ("Collectives", f"{len(report.collectives):,}"),
        ("Unexplained", f"{len(report.unexplained):,}"),
        ("Missing", f"{len(report.missing):,}" if report.checked else "not checked"),
        ("Payload a call", at_least + format_bytes(report.payload_bytes)),
        ("Wire a call", at_least + format_bytes(report.wire_bytes)),
    ]
    if report.kernels:
        facts.append(("Kernels", kernels_line(report.kernels)))
    wrong = {"Unexplained": report.unexplained, "Missing": report.missing}
    pairs = (
        el("div", el("dt", name), el("dd", fact), class_="bad" if wrong.get(name) else None)
        for name, fact in facts
    )
    return el("dl", *pairs)


def _make_footer() -> Html:
    terms = [join_html([el("dt", name), el("dd", meaning)]) for name, meaning in _ORIGINS.items()]
    bytes_ = (
        "Payload is S as nccl-tests define it, in the declared dtype: the operand's bytes on one "
        "device, times n for an all-gather. Wire is what each device sends, in the compiled "
        "dtype: S times 2(n−1)/n for an all-reduce, (n−1)/n for an all-gather, a reduce-scatter "
        "and an all-to-all, 1 for others. Trips are executions in one call of the program; ≥ "
        "stands where the length of a loop is not known. Kernels are txcore's, with how often the "
        "traced program computes the forward pass of each, a loop's body taken once."
    )
    return el(
        "footer",
        el("details", el("summary", "What the words mean"), el("p", bytes_), el("dl", *terms)),
    )
