"""The page as text: what it holds, that it is whole, and that it lets nothing in or out."""

import base64
import hashlib
import html.parser
import itertools
import os
import re
from collections import Counter

import jax
import numpy as np
import pytest
from html_cases import HOSTILE, MESH, ROW, added, failed, hostile, large, part, row
from jax.sharding import PartitionSpec as P

from txcore.profiling import Report, audit
from txcore.profiling.report.html.figures import axis_sets
from txcore.profiling.report.html.markup import Html, el, escape_text, join_html
from txcore.profiling.report.html.page import to_html

VOID = {"meta", "input"}


class Page(html.parser.HTMLParser):
    """All elements of a page with their attributes and text; fails where tags do not match."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(source)
        self.close()
        assert not self.open, "these were left open"

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice"
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def texts(self, tag):
        return [content for name, _, content in self.elements if name == tag]

    def values(self, attribute):
        return [a[attribute] for _, a, _ in self.elements if attribute in a]


def cells(page):
    """The cells of the table of rows, without the folded ones."""
    table = page[page.index('<table class="rows') :]
    lines = [Page(body).texts("td") for body in re.findall(r"<tr><td>.*?</tr>", table)]
    return [line for line in lines if len(line) == 11]


REPORTS = {
    "failed": failed(),
    "empty": Report(()),
    "unchecked": Report((ROW, added()), checked=False),
    "one device": Report((row(axes=(), group_size=1),), mesh=(("data", 1),)),
    "a mesh of four axes": Report((row(),), mesh=(("pod", 2), *MESH, ("stage", 67))),
    "hostile": hostile(HOSTILE[0]),
}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
@pytest.mark.parametrize("other", [None, failed()], ids=["alone", "compared"])
def test_a_page_is_well_formed_and_asks_for_nothing(report, other):
    source = to_html(report, other)
    page = Page(source)
    assert source.startswith("<!doctype html>\n")
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    assert not page.values("src")
    assert not page.values("style")
    assert not [name for _, a, _ in page.elements for name in a if name.startswith("on")]
    assert {link[1:] for link in page.values("href")} <= set(ids)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|eval\(", source)
    assert {tag for tag, _, _ in page.elements}.isdisjoint({"img", "link", "iframe", "base"})
    assert source == to_html(report, other)


def test_the_policy_allows_the_style_and_the_script_of_the_page_alone():
    page = Page(to_html(failed(), failed()))
    (policy,) = [a["content"] for _, a, _ in page.elements if "http-equiv" in a]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    for tag in ("script", "style"):
        (code,) = page.texts(tag)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert not rules


@pytest.mark.parametrize("hostile_text", HOSTILE)
@pytest.mark.parametrize("other", [None, failed()], ids=["alone", "compared"])
def test_no_text_makes_an_element_or_an_attribute(hostile_text, other):
    def shape(text):
        page = Page(to_html(hostile(text), other, title=text))
        return Counter((tag, *sorted(attributes)) for tag, attributes, _ in page.elements)

    assert shape(hostile_text) == shape("plain")


@pytest.mark.parametrize("hostile_text", HOSTILE)
def test_a_text_is_shown_whole_and_nothing_in_it_is_hidden(hostile_text):
    source = to_html(hostile(hostile_text), title=hostile_text)
    assert source.replace("\n", "").isprintable()
    source.encode("utf-8")
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in hostile_text)
    assert Page(source).texts("h1") == [shown]
    assert shown in Page(source).texts("code")


def test_every_row_is_there_with_the_unexplained_first():
    lines = cells(to_html(failed()))
    assert [line[0] for line in lines] == ["3", "1", "2", "4", "5"]
    assert lines[0][1:10] == [
        *("all-reduce", "data + model", "8", "bfloat16 → float32", "50 B", "3 kB", "1", "3 kB"),
        "✕ partitioner",
    ]
    assert lines[0][10] == "psumtrain.py:52made by a dot"
    assert lines[1][10] == "psum/a psum/band 1 moretrain.py:40"
    assert lines[2][4:10] == ["float32", "20 kB", "10 kB", "≥ 3", "≥ 30 kB", "user"]
    assert lines[3][2:4] == ["–", "?"]
    assert lines[3][9] == "! opaque"


def test_a_row_unfolds_to_its_arrays():
    page = to_html(failed())
    (parts,) = re.findall(r'<table class="parts"[^>]*>.*?</table>|$', page)[:1]
    lines = [Page(line).texts("td") for line in re.findall(r"<tr><td>.*?</tr>", parts)]
    assert lines == [
        [tag, "bfloat16 → float32", "250", "500 B", "train.py:41", "combined, promoted"]
        for tag in ("psum/a", "psum/b")
    ]
    assert "jit(step)/shard_map/psum" in page


def test_a_row_of_one_array_says_what_became_of_it():
    page = Page(to_html(Report((row(parts=(part("psum/grads.kernel"),)),))))
    facts = page.texts("dd")[8:12]
    assert facts == ["all-reduce.1", "jit(step)/shard_map/psum", "250", "combined, promoted"]


def test_many_tags_without_arrays_unfold_too():
    tags = tuple(f"psum/{letter}" for letter in "abcde")
    assert set(tags) <= set(Page(to_html(Report((row(tags=tags),)))).texts("code"))


def test_what_is_missing_what_hangs_the_plan_and_the_fates():
    page = Page(to_html(failed()))
    for heading in (
        *("Declared but missing", "Under a predicate that differs", "What the plan predicts"),
        "Fates of what is declared",
    ):
        assert heading in page.texts("h2")
    assert "loss.py:3" in page.texts("td")
    assert "✕ hangs" in page.texts("span")
    assert "✕ short" in page.texts("span")
    assert "1 combined, promoted · 1 missing" in page.texts("summary")
    assert page.values("href") == ["#r1"]


def test_sections_without_content_are_left_out():
    headings = Page(to_html(Report(()))).texts("h2")
    assert headings == ["Mesh", "Bytes per axis and kind"]


@pytest.mark.parametrize(
    "report, state",
    [
        (Report((ROW,)), "✓Proved"),
        (Report(()), "✓Proved"),
        (Report((row(origin="autodiff"),)), "?Not proved"),
        (Report((ROW,), checked=False), "?Not proved"),
        (Report((), checked=False), "?Not proved"),
        (Report((added(),), checked=False), "✕Failed"),
    ],
)
def test_the_verdict_is_said_in_words_and_a_sign(report, state):
    page = Page(to_html(report))
    (verdict,) = [t for _, a, t in page.elements if a.get("class", "").startswith("verdict")]
    assert verdict == state + report.verdict()


def test_bytes_per_axis_and_kind():
    rows = (
        row(trips=2),
        row(wire_bytes=6000, tags=()),
        row(kind="all-gather", wire_bytes=1000),
        added(axes=("model",), wire_bytes=20_000, payload_bytes=7000),
    )
    page = to_html(Report(rows, mesh=MESH))
    (traffic,) = re.findall(r'<table class="traffic">.*?</table>', page)
    bodies = [
        [
            Page(line).texts("th") + Page(line).texts("td")[:4]
            for line in re.findall(r"<tr>.*?</tr>", body)
        ]
        for body in re.findall(r"<tbody>(.*?)</tbody>", traffic)
    ]
    assert bodies == [
        [["model", "all-reduce ✕ 1 unexplained", "1", "7 kB", "20 kB"]],
        [["data", "all-reduce", "2", "3 kB", "12 kB"], ["all-gather", "1", "1 kB", "1 kB"]],
    ]
    bars = [a for tag, a, _ in Page(traffic).elements if tag == "rect"]
    widths = [(bar["class"], bar["x"], bar["width"]) for bar in bars]
    assert widths[:4] == [
        *(("payload", "0.00%", "35.00%"), ("bad", "0.00%", "100.00%")),
        *(("payload", "0.00%", "15.00%"), ("wire", "0.00%", "60.00%")),
    ]


@pytest.mark.parametrize(
    "mesh",
    [(("a", 8),), (("a", 4), ("b", 2)), (("a", 2), ("b", 3), ("c", 5)), (("a", 1), ("b", 6))],
)
def test_groups_of_the_mesh_by_numpy(mesh):
    names, sizes = zip(*mesh, strict=True)
    devices = np.arange(np.prod(sizes)).reshape(sizes)
    every = [s for n in (1, 2, 3) for s in itertools.combinations(names, n)]
    page = Page(to_html(Report(tuple(row(axes=axes) for axes in every), mesh=mesh)))
    items = page.texts("li")
    assert len(items) == len(every)
    for axes in every:
        place = tuple(slice(None) if name in axes else 0 for name in names)
        group = devices[place].ravel().tolist()
        few = group if len(group) <= 4 else [*group[:3], "…", group[-1]]
        groups = devices.size // len(group)
        said = f"{groups} group{'s' * (groups > 1)} of {len(group)}: {', '.join(map(str, few))}"
        assert f"{' + '.join(axes)} {said}" in items


def drawing(mesh, axes):
    """The lines of the drawn mesh, and the corners of the one group that is lit up."""
    page = to_html(Report((row(axes=axes),), mesh=mesh))
    (lines,) = re.findall(r'<path d="([^"]*)" class="lines">', page)
    (group,) = re.findall(r'<g class="group on".*?</g>', page)
    faces = [
        np.array([point.split() for point in face.split("L")], float)
        for face in re.findall(r'd="M(.*?)Z"', group)
    ]
    return lines.count("M"), faces


def test_a_flat_mesh_is_drawn_to_scale():
    lines, (face,) = drawing((("data", 4), ("model", 8)), ("model",))
    assert lines == 3 + 7
    width, height = np.ptp(face, axis=0)
    assert width / height == pytest.approx(8)
    _, (face,) = drawing((("data", 4), ("model", 8)), ("data", "model"))
    width, height = np.ptp(face, axis=0)
    assert width / height == pytest.approx(2)


def test_a_block_shows_three_sides():
    mesh = (("a", 16), ("b", 16), ("c", 16))
    lines, faces = drawing(mesh, ("a", "b", "c"))
    assert lines == 3 * 15
    assert len(faces) == 3
    assert len(drawing(mesh, ("a",))[1]) == 2  # its right side is inside of the block


@pytest.mark.parametrize("size", [33, 512, 509, 4096, 100_000])
def test_a_long_axis_is_drawn_with_few_squares(size):
    page = to_html(Report((ROW,), mesh=(("data", size),)))
    (step,) = re.findall(r"One square is several devices: (\d+) along data", page)
    (lines,) = re.findall(r'<path d="([^"]*)" class="lines">', page)
    squares = lines.count("M") + 1
    assert squares <= 32
    assert (squares - 1) * int(step) < size <= squares * int(step)
    assert f"data {size:,}</text>" in page


def test_devices_have_numbers_where_there_is_room():
    page = to_html(Report((ROW,), mesh=MESH))
    assert re.findall(r'text-anchor="middle">(\d+)<', page) == list("01234567")


def test_what_changed_since_an_earlier_report():
    before = Report((ROW, row(tags=("a",)), row(tags=("b",))))
    after = Report((ROW, row(tags=("a",), wire_bytes=5000), added()))
    page = to_html(after, before)
    changes = page[page.index('id="changes"') : page.index("</section>")]
    assert "1 added, 1 removed, 1 grown, 1 same: 9 kB → 11 kB on the wire" in changes
    assert f"<dt>Before</dt><dd>{before.verdict()}</dd>" in changes
    assert "1 unchanged" in changes
    lines = [Page(line).texts("td") for line in re.findall(r"<tr><td>.*?</tr>", changes)]
    figures = {line[5]: (line[0], *line[6:]) for line in lines if line[5]}
    assert figures == {
        "btrain.py:40": ("− removed", "1 kB", "–", "3 kB", "–", "−3 kB"),
        "train.pytrain.py:40": ("+ added", "–", "1 kB", "–", "3 kB", "+3 kB"),
        "atrain.py:40": ("▲ grown", "1 kB", "1 kB", "3 kB", "5 kB", "+2 kB"),
        "psum/grads.kerneltrain.py:40": ("= same", "1 kB", "1 kB", "3 kB", "3 kB", "0 B"),
    }


def test_a_page_of_2000_rows_is_small():
    source = to_html(large(2000))
    assert len(source.encode()) < 3_000_000
    assert source.count('<tbody id="r') == 2000


def test_a_real_audit(tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def total(x):
        return jax.lax.psum(jax.lax.psum(x, "data"), "model")

    mapped = jax.shard_map(total, mesh=mesh, in_specs=P(("data", "model")), out_specs=P())
    report = audit(mapped, jax.ShapeDtypeStruct((8, 128), "float32"))
    report.to_html(tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert source == to_html(report)
    assert len(cells(source)) == len(report.collectives)
    assert report.verdict() in Page(source).texts("p")
    assert str(os.getcwd()) not in source


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(TypeError, match="to_html needs reports, but got a str: pass what audit"):
        failed().to_html(path, "other")
    assert path.read_text() == "old"
    failed().to_html(str(path), Report(()))
    assert path.read_text(encoding="utf-8") == to_html(failed(), Report(()))
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_file_keeps_the_usual_rights_and_a_link_stays_one(tmp_path):
    usual = tmp_path / "usual"
    usual.write_text("")
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "real.html")
    Report(()).to_html(link)
    assert link.is_symlink()
    assert (tmp_path / "real.html").stat().st_mode == usual.stat().st_mode


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs an existing folder .* create it first"):
        Report(()).to_html(tmp_path / "none" / "report.html")


def test_markup():
    assert escape_text("a<b>&\"'") == "a&lt;b&gt;&amp;&quot;&#x27;"
    assert escape_text(Html("<b>")) == "<b>"
    assert join_html(["<", Html("<i>"), None, "", 0], ", ") == "&lt;, <i>, 0"
    assert el("a", "x", href="#r1", title='"', hidden=True, id=None, name=False) == (
        '<a href="#r1" title="&quot;" hidden>x</a>'
    )
    assert el("meta", http_equiv="x", class_="y") == '<meta http-equiv="x" class="y">'


def test_axis_sets_have_the_axes_of_the_mesh_first():
    rows = (row(axes=("data", "model")), row(axes=()), row(axes=("model",)))
    sets = axis_sets(Report(rows, mesh=MESH))
    assert sets == (("data",), ("model",), (), ("data", "model"))
