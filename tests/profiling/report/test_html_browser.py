"""The page in a real browser: what it shows, does, asks for and refuses."""

import json

import chromium
import pytest
from html_cases import HOSTILE, MESH, added, failed, hostile, large, row

from txcore.profiling import Report
from txcore.profiling.report.html.page import to_html

PROGRAM = chromium.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium is installed")
BAD_LOGS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")

# WCAG's contrast of each text with what is behind it; the page has no transparent colours there.
CONTRAST = """(() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let least = 21;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!element.checkVisibility() || element.closest("script, svg")) continue;
    if (!walker.currentNode.data.trim()) continue;
    const [a, b] = [light(channels(getComputedStyle(element).color)), light(behind(element))];
    least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return least;
})()"""
ROWS = "[...document.querySelectorAll('.rows > tbody')]"
SHOWN = f"{ROWS}.filter((row) => row.checkVisibility()).map((row) => Number(row.id.slice(1)))"
LIT = "[...document.querySelectorAll('.group.on')].map((group) => group.dataset.g)"


@pytest.fixture(scope="module")
def browser():
    with chromium.start(PROGRAM) as started:
        yield started


@pytest.fixture
def show(browser, tmp_path):
    """Open a report's page, wide and light unless said otherwise."""

    def opened(report, other=None, width=1280, dark=False, title="Test"):
        path = tmp_path / "report.html"
        path.write_text(to_html(report, other, title=title), encoding="utf-8")
        return chromium.Page(browser, path, width, dark)

    return opened


def choose(page, name, value):
    """Set a control of the filter as a user does."""
    field = f"document.querySelector('.filters').elements.{name}"
    event = "dispatchEvent(new Event('input', {bubbles: true}))"
    page.run(f"{field}.value = {json.dumps(value)}; {field}.{event}")


def click(page, selector):
    """Press the mouse in the middle of an element."""
    box = page.run(
        f"(() => {{const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView();"
        "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]})()"
    )
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        at = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        page.call("Input.dispatchMouseEvent", type=kind, **at)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 820, 400])
def test_it_fits_is_legible_and_asks_for_nothing(show, width, dark):
    page = show(failed(), Report(large(30).collectives, mesh=MESH), width, dark)
    page.run("for (const details of document.querySelectorAll('details')) details.open = true")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run(CONTRAST) >= 4.5
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(21, 24, 27)" if dark else "rgb(255, 255, 255)")
    assert len(page.events("Network.requestWillBeSent")) == 1  # the file itself
    assert page.events(*BAD_LOGS) == []


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_do_nothing(show, text):
    page = show(hostile(text), failed(), width=400, title=text)
    assert page.run("window.pwned === undefined")
    assert page.events("Page.javascriptDialogOpening", *BAD_LOGS) == []
    assert len(page.events("Network.requestWillBeSent")) == 1
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    assert page.run("document.querySelector('h1').textContent") == shown
    assert page.run("document.title") == " ".join(shown.split())


def test_the_policy_stops_what_the_page_did_not_come_with(show):
    page = show(failed())
    page.run(
        "const made = document.createElement('script'); made.textContent = 'window.pwned = 1';"
        "document.body.append(made); document.body.setAttribute('onclick', 'window.pwned = 1');"
        "document.body.click(); new Image().src = 'data:image/png;base64,AAAA';"
    )
    assert page.run("window.pwned === undefined")
    assert len(page.events("Log.entryAdded")) == 3


def test_columns_sort(show):
    rows = [row(payload_bytes=size, source=f"{name}.py:1", tags=()) for size, name in
            ((5_000, "b"), (70, "c"), (10**6, "a"), (800, "d"))]  # fmt: skip
    rows.append(row(group_size=0, payload_bytes=1, source="e.py:1", tags=()))
    page = show(Report(tuple(rows), mesh=MESH))
    assert page.run(SHOWN) == [1, 2, 3, 4, 5]
    orders = {6: [3, 1, 4, 2, 5], 11: [3, 1, 2, 4, 5], 1: [1, 2, 3, 4, 5]}
    for column, order in orders.items():
        button = f".rows > thead th:nth-child({column}) button"
        click(page, button)
        assert page.run(SHOWN) == order
        click(page, button)
        assert page.run(SHOWN) == order[::-1]
        sorted_by = page.run(
            "[...document.querySelectorAll('[aria-sort]')].map((h) => h.cellIndex)"
        )
        assert sorted_by == [column - 1]


def test_a_column_sorts_by_the_keyboard(show):
    page = show(Report((row(payload_bytes=1), row(payload_bytes=2)), mesh=MESH))
    page.run("document.querySelector('.rows > thead th:nth-child(6) button').focus()")
    for kind in ("keyDown", "keyUp"):
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        page.call("Input.dispatchKeyEvent", type=kind, **key)
    assert page.run(SHOWN) == [2, 1]


def test_filters(show):
    page = show(failed())
    said = "document.querySelector('.filters output').textContent"
    choose(page, "origin", "!")
    assert page.run(SHOWN) == [3]
    assert page.run(said) == "1 of 5 shown"
    choose(page, "origin", "user")
    assert page.run(SHOWN) == [2]
    choose(page, "axes", "0")
    assert page.run(SHOWN) == []
    choose(page, "origin", "")
    assert page.run(SHOWN) == [1, 5]
    choose(page, "find", "PSUM/B train.py")
    assert page.run(SHOWN) == [1]
    page.run("document.querySelector('#fates a').click()")
    choose(page, "find", "nothing like it")
    assert page.run(SHOWN) == []
    page.run("location.hash = ''; location.hash = '#r1'")
    assert page.run(f"new Promise((done) => setTimeout(() => done({SHOWN}), 50))") == [
        3,
        1,
        2,
        4,
        5,
    ]
    assert page.run(said) == ""


def test_a_row_and_a_button_light_up_a_group(show):
    page = show(Report((row(), row(axes=("model",)), row(axes=("data", "model"))), mesh=MESH))
    assert page.run(LIT) == ["0"]
    for place, group in ((2, "1"), (3, "2"), (1, "0")):
        page.run(f"document.querySelector('#r{place} summary').focus()")
        assert page.run(LIT) == [group]
    page.run("document.activeElement.blur()")
    click(page, ".groups li:nth-child(2) button")
    assert page.run(LIT) == ["1"]
    pressed = "[...document.querySelectorAll('.groups button')].map((b) => b.ariaPressed)"
    assert page.run(pressed) == ["false", "true", "false"]
    click(page, "#r3 td")
    assert page.run(LIT) == ["2"]
    click(page, "h1")
    assert page.run(LIT) == ["1"]


def test_a_row_unfolds(show):
    page = show(failed())
    folded = f"{ROWS}.map((row) => row.rows[1].checkVisibility())"
    assert page.run(folded) == [False] * 5
    click(page, "#r1 summary")
    assert page.run(folded) == [False, True, False, False, False]


def test_it_is_whole_without_scripts(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(to_html(failed()), encoding="utf-8")
    page = chromium.Page(browser, path, 1280, False, scripts=False)
    assert page.run(SHOWN) == [3, 1, 2, 4, 5]
    assert page.run("document.querySelector('.filters').checkVisibility()") is False
    assert page.run("document.querySelectorAll('.rows > thead button').length") == 0
    click(page, "#r1 summary")
    assert page.run("document.querySelector('#r1 .parts').checkVisibility()")


def test_everything_is_printed(show):
    page = show(Report((*failed().collectives, added()), fates=large(30).fates, mesh=MESH))
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.run("document.querySelector('.filters').checkVisibility()") is False
    assert page.run(f"{ROWS}.every((row) => row.rows[1].checkVisibility())")
    last = "[...document.querySelectorAll('#fates td')].at(-1)"
    assert page.run(f"{last}.checkVisibility({{contentVisibilityAuto: true}})")
    assert page.run(f"{last}.getBoundingClientRect().height") > 0


def test_2000_rows_open_and_sort_quickly(show):
    page = show(large(2000))
    timing = "performance.getEntriesByType('navigation')[0].domComplete"
    assert page.run(timing) < 60_000  # milliseconds, beside other tests
    started = "const start = performance.now();"
    press = "document.querySelector('.rows > thead th:nth-child(6) button').click();"
    layout = "document.body.offsetHeight; performance.now() - start"
    assert page.run(f"{started} {press} {layout}") < 40_000
    assert page.run(SHOWN)[0] == 2000
