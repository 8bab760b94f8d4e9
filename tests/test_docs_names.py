"""What the pages name is there: pages in the index, functions of txcore, fields of its JSON."""

import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from docs_cases import BLOCK, MARKDOWN, PAGES, ROOT
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore import cli
from txcore.cli import programs
from txcore.profiling import audit, costs
from txcore.profiling.trace.show.table import describe_trace
from txcore.profiling.trace.trace import measure_ranks

sys.path.insert(0, str(pathlib.Path(__file__).parent / "profiling" / "trace"))
from hand_made import make_rank, make_run

SKILL = "docs/SKILL.md"


def test_the_index_names_every_page_once():
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    named = re.findall(r"^- \[[^\]]+\]\(([^)#]+)\)", text, re.MULTILINE)
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    assert sorted(name for name in named if "/" not in name) == sorted({*pages} - {"index.md"})


@pytest.mark.parametrize("page", MARKDOWN)
def test_every_function_that_is_named_exists(page):
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    text = re.sub(r"^\| `tx\..*?\|", "|", text, flags=re.MULTILINE) if "migrate" in page else text
    absent = []
    for name in sorted(set(re.findall(r"`tx((?:\.[a-zA-Z_]\w*)+)", text))):
        found: Any = tx
        for part in name[1:].split("."):
            found = getattr(found, part, None)
        if found is None:
            absent.append(name)
    assert not absent


@pytest.mark.parametrize("page", PAGES)
def test_anchors_exist(page):
    """A link to a heading of a page names it as GitHub and the site do."""
    absent = []
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for file, anchor in re.findall(r"\]\(([^)\s:#]*)#([^)\s]+)\)", text):
        target = (ROOT / page).parent / file if file else ROOT / page
        headings = BLOCK.sub("", target.read_text(encoding="utf-8"))
        slugs = {
            re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", headings, re.MULTILINE)
        }
        if anchor not in slugs:
            absent.append(f"{file}#{anchor}")
    assert not absent


def named_fields(heading):
    """Return the names in back quotes of the first column of the table below a heading."""
    text = (ROOT / SKILL).read_text(encoding="utf-8")
    table = text.partition(f"{heading} |\n")[2].partition("\n\n")[0]
    rows = [row.split("|")[1:] for row in table.splitlines()[1:]]
    return [(re.findall(r"`(\w+)`", row[0]), re.findall(r"`(\w+)`", row[1])) for row in rows]


def test_the_skill_names_the_fields_of_a_report():
    total = jax.shard_map(
        lambda x: tx.psum(x, "data"),
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=P("data"),
        out_specs=P(),
    )
    report = audit(total, jnp.ones(8)).to_dict()
    rows = named_fields("| field | of a report")
    assert {name for names, _ in rows for name in names} == {*report}
    said = {names[0]: more for names, more in rows}
    assert {*said["collectives"]} == {*report["collectives"][0]}
    assert {*said["fates"]} == {*report["fates"][0]}


def test_the_skill_names_the_fields_of_the_others():
    run = programs.Run((), (), (), (), (), (), False)
    rows = named_fields("| field | of a command's object")
    assert {name for names, _ in rows for name in names} == {*programs.to_dict(run, 0)}
    text = (ROOT / SKILL).read_text(encoding="utf-8")
    said = dict(re.findall(r"^\| `(costs|trace|doctor)` \| (.*) \|$", text, re.MULTILINE))
    found = costs(lambda x: x @ x, jnp.ones((8, 8))).to_dict()
    assert {*re.findall(r"`(\w+)`", said["costs"])} <= {*found, *found["schedule"]}
    assert {*found} <= {*re.findall(r"`(\w+)`", said["costs"])}
    events = [e for i in range(3) for d in (0, 1) for e in make_run(100 * i, i + 1, d, 10, 70)]
    trace = describe_trace(measure_ranks([make_rank(events)]))
    assert {*re.findall(r"`(\w+)`", said["trace"])} == {*trace}


def test_the_skill_names_every_command():
    text = (ROOT / SKILL).read_text(encoding="utf-8")
    commands = {module.__name__.rpartition(".")[2] for module in cli._COMMANDS} - {"tune"}
    assert commands <= set(re.findall(r"txcore (\w+)", text))
