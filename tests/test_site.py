"""The site of docs/: it builds without a warning, its links lead somewhere, and it fetches nothing.

`make docs` builds it and names it by TXCORE_SITE; elsewhere it is built here, where Sphinx is.
"""

import html.parser
import importlib.util
import os
import pathlib
import subprocess
import sys
import urllib.parse

import pytest
from docs_cases import PAGES, ROOT

sys.path.insert(0, str(pathlib.Path(__file__).parent / "profiling" / "report"))
import chromium
from test_html_browser import BAD_LOGS, CONTRAST

NEEDED = ("sphinx", "myst_parser", "furo")
BUILT = os.environ.get("TXCORE_SITE")
pytestmark = pytest.mark.skipif(
    not BUILT and not all(map(importlib.util.find_spec, NEEDED)),
    reason="the site needs pip install 'txcore[docs]'",
)
SHOWN = ("docs/index", "docs/tour", "docs/concepts", "docs/api/profiling", "search")


class Read(html.parser.HTMLParser):
    """Read what a page loads, links to, and can be linked to by."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.names, self.headings = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.append(given["href"])
        if tag in ("h1", "h2", "h3", "h4", "h5"):
            self.headings.append(int(tag[1]))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if BUILT:
        return (ROOT / BUILT).resolve()
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", ".")
    done = subprocess.run((*command, folder), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    files = [file for file in site.glob("**/*.html") if "_static" not in file.parts]
    return {file: Read(file.read_text(encoding="utf-8")) for file in files}


def test_every_page_is_in_it(site, pages):
    there = {file.relative_to(site).with_suffix(".md").as_posix() for file in pages}
    assert {page for page in PAGES if page != "examples/slurm/README.md"} <= there
    assert len([name for name in there if name.startswith("docs/api/")]) >= 10


def test_it_loads_nothing_from_elsewhere(pages):
    outside = {
        load for page in pages.values() for load in page.loads if urllib.parse.urlparse(load).netloc
    }
    assert not outside


def test_its_links_lead_somewhere(pages):
    absent = []
    for file, page in pages.items():
        for link in page.links:
            parts = urllib.parse.urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            path = urllib.parse.unquote(parts.path)
            target = (file.parent / path).resolve() if path else file
            names = pages[target].names if target in pages else {parts.fragment}
            if not target.exists() or (parts.fragment and parts.fragment not in names):
                absent.append((file.name, link))
    assert not absent


def test_headings_go_down_one_by_one(pages):
    for file, page in pages.items():
        if file.name == "search.html":  # made by its script
            continue
        assert page.headings[:1] == [1], file
        assert page.headings.count(1) == 1, file
        steps = zip(page.headings, page.headings[1:], strict=False)
        assert all(after - before <= 1 for before, after in steps), (file, page.headings)


@pytest.mark.skipif(chromium.find() is None, reason="no chromium is installed")
def test_it_fits_is_legible_and_asks_for_nothing(site):
    with chromium.start(chromium.find()) as browser:
        for name in SHOWN:
            for width in (1280, 400):
                for dark in (False, True):
                    page = chromium.Page(browser, site / f"{name}.html", width, dark)
                    where = (name, width, dark)
                    assert page.run("document.documentElement.scrollWidth") <= width, where
                    assert page.run(CONTRAST) >= 4.5, where
                    requests = page.events("Network.requestWillBeSent")
                    fetched = [request["request"]["url"] for request in requests]
                    assert all(url.startswith(("file:", "data:")) for url in fetched), fetched
                    assert page.events(*BAD_LOGS) == [], where
