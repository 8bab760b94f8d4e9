"""The pages under axe-core, an accessibility linter: TXCORE_AXE names its axe.min.js.

`npm install axe-core` has it in node_modules/axe-core. Contrast, names, headings, landmarks and
keyboard: of reports and a trace, wide and narrow, light and dark, and with TXCORE_SITE=build/site
of some pages of the site.
"""

import os
import pathlib
import sys

import pytest
from docs_cases import ROOT

from txcore.profiling.report.html.page import to_html
from txcore.profiling.trace.show.page import to_page
from txcore.profiling.trace.trace import measure_ranks

sys.path += [str(ROOT / "tests/profiling/report"), str(ROOT / "tests/profiling/trace")]
import chromium
from hand_made import make_rank, make_run
from html_cases import failed, large

chromium._SECONDS = 600  # axe takes long where other tests run
AXE = os.environ.get("TXCORE_AXE")
SITE = os.environ.get("TXCORE_SITE")
pytestmark = pytest.mark.skipif(not AXE, reason="TXCORE_AXE names no axe.min.js")
FORMS: tuple[tuple[int, bool], ...] = ((1280, False), (1280, True), (400, False), (400, True))
SHOWN = ("index", "tour", "concepts", "your-model", "collectives", "api/profiling")
RUN = """axe.run(document, {runOnly:
  ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]})
  .then((found) => found.violations.map((v) => `${v.id}: ${v.nodes.length} x ` +
    v.nodes.slice(0, 3).map((node) => node.html.slice(0, 160)).join(" | ")))"""


def write_reports(folder):
    """Write the pages of a failed report beside an earlier one, of a large one, and of a trace."""
    events = [e for i in range(5) for d in (0, 1) for e in make_run(100 * i, i + 1, d, 10, 70)]
    texts = {
        "failed": to_html(failed(), large(30)),
        "large": to_html(large(30)),
        "trace": to_page(measure_ranks([make_rank(events)])),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return [folder / f"{name}.html" for name in texts]


def list_violations(browser, file, width, dark):
    page = chromium.Page(browser, file, width, dark)
    page.run("for (const details of document.querySelectorAll('details')) details.open = true")
    page.run(pathlib.Path(AXE).read_text(encoding="utf-8"))
    return page.run(RUN)


def find_pages(folder):
    """Return the pages to look at, and the forms of each."""
    pages = dict.fromkeys(write_reports(folder), FORMS)
    if SITE:
        site = [(ROOT / SITE / f"docs/{name}.html").resolve() for name in SHOWN]
        pages |= dict.fromkeys(site, (FORMS[0], FORMS[3]))
    return pages


def test_axe_finds_no_violation(tmp_path):
    found = {}
    with chromium.start(chromium.find()) as browser:
        for file, forms in find_pages(tmp_path).items():
            for width, dark in forms:
                if violations := list_violations(browser, file, width, dark):
                    found[file.name, width, dark] = violations
    assert not found, "\n".join(f"{where}: {text}" for where, text in found.items())
