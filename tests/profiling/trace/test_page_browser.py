"""The page of a trace in a real browser: it fits, is legible, and asks for nothing."""

import pathlib
import sys

import pytest
from hand_made import make_rank, make_run

from txcore.profiling.trace.show.page import to_page
from txcore.profiling.trace.trace import measure_ranks

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "report"))
import chromium
from test_html_browser import BAD_LOGS, CONTRAST

PROGRAM = chromium.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium is installed")


@pytest.fixture(scope="module")
def browser():
    with chromium.start(PROGRAM) as started:
        yield started


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_is_legible_and_asks_for_nothing(browser, tmp_path, width, dark):
    events = [
        e for i in range(5) for d in (0, 1) for e in make_run(100 * i, i + 1, d, 10 + 50 * d, 70)
    ]
    path = tmp_path / "trace.html"
    path.write_text(to_page(measure_ranks([make_rank(events)])), encoding="utf-8")
    page = chromium.Page(browser, path, width, dark)
    page.run("for (const details of document.querySelectorAll('details')) details.open = true")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run(CONTRAST) >= 4.5
    assert page.run("document.querySelectorAll('rect.k-waiting').length") > 0
    assert len(page.events("Network.requestWillBeSent")) == 1  # the file itself
    assert page.events(*BAD_LOGS) == []
