"""The pages under axe-core, an accessibility linter: npm install axe-core, and

    TXCORE_AXE=node_modules/axe-core/axe.min.js [TXCORE_SITE=build/site] pytest tests/test_accessibility.py

Contrast, names, headings, landmarks, keyboard: of a report, a trace and a site, in each of four forms.
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

AXE = os.environ.get("TXCORE_AXE")
SITE = os.environ.get("TXCORE_SITE")
pytestmark = pytest.mark.skipif(not AXE, reason="TXCORE_AXE names no axe.min.js")
RUN = """axe.run(document, {runOnly: ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]})
  .then((found) => found.violations.map((v) =>
    `${v.id}: ${v.nodes.length} x ${v.nodes.slice(0, 3).map((n) => n.html.slice(0, 160)).join(" | ")}`))"""


def write_reports(folder):
    """Write the pages of a failed report beside an earlier one, of a large one, and of a trace."""
    events = [e for i in range(5) for d in (0, 1) for e in make_run(100 * i, i + 1, d, 10, 70)]
    texts = {
        "failed": to_html(failed(), large(30)),
        "large": to_html(large(200)),
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


def test_axe_finds_no_violation(tmp_path):
    files = write_reports(tmp_path)
    if SITE:
        files += sorted((ROOT / SITE).resolve().glob("**/*.html"))
        files = [file for file in files if "_static" not in file.parts]
    found = {}
    with chromium.start(chromium.find()) as browser:
        for file in files:
            for width in (1280, 400):
                for dark in (False, True):
                    if violations := list_violations(browser, file, width, dark):
                        found[file.name, width, dark] = violations
    assert not found, "\n".join(f"{where}: {text}" for where, text in found.items())
