"""What a notebook shows: framed, sandboxed, escaped; nothing is fetched and nothing runs."""

import dataclasses
import html

import jax.numpy as jnp
import pytest
from html_cases import HOSTILE, ROW
from markup import Tags

from txcore.profiling import Report, costs, lock

EVIL = "".join(HOSTILE)


def of_evil():
    return Report((dataclasses.replace(ROW, tags=(EVIL,), source=EVIL, op_name=EVIL),))


@pytest.mark.parametrize("report", [Report(()), Report((ROW,)), of_evil()])
def test_a_report_is_a_sandboxed_frame(report, tmp_path):
    ((tag, attributes),) = Tags(report._repr_html_()).found
    assert tag == "iframe"
    assert attributes.keys() == {"sandbox", "srcdoc", "title", "style"}  # and no src
    assert attributes["sandbox"] is None  # bare: neither scripts nor forms nor the same origin
    assert attributes["title"] == report.verdict()
    report.to_html(tmp_path / "page.html")
    assert attributes["srcdoc"] == (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_frame_s_page_fetches_nothing():
    page = Tags(Tags(of_evil()._repr_html_()).found[0][1]["srcdoc"])
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in page.found}
    assert not {"src", "href"} & {name for _, given in page.found for name in given}
    (policy,) = [a["content"] for _, a in page.found if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'; ")


def test_costs_are_text_with_the_verdict_last():
    found = costs(lambda x: x @ x, jnp.ones((8, 8)))
    shown = Tags(found._repr_html_())
    assert [tag for tag, _ in shown.found] == ["pre"]
    assert shown.text == f"{found}\n\nproved: no collective in the program"


def test_a_locks_outcome_is_escaped_text(tmp_path):
    outcome = lock.Outcome(False, True, f"+ {EVIL}\n- gone")
    assert str(outcome) == outcome.text
    shown = outcome._repr_html_()
    assert [tag for tag, _ in Tags(shown).found] == ["pre"]
    assert html.unescape(shown).endswith("\n- gone</pre>")
    assert "<script" not in shown
