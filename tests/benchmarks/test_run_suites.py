"""`make bench`: which run it compares with, what it calls a change, and the page it draws."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import run_suites

ROOT = pathlib.Path(__file__).parents[2]


def make_run(times, node="a", jax="0.12.0", spread=0.01):
    """Return a run as pytest-benchmark saves it; `times` by (group, name)."""
    return {
        "machine_info": {
            "node": node,
            "machine": "x86_64",
            "python_version": "3.13.1",
            "jax": jax,
            "cpu": {"brand_raw": "a CPU", "count": 2},
        },
        "benchmarks": [
            {"group": group, "name": name, "stats": {"median": median, "iqr": spread * median}}
            for (group, name), median in times.items()
        ],
    }


NOW = {("kernels", "a"): 2.0, ("kernels", "b"): 1.0, ("steps", "c"): 4.0, ("steps", "new"): 1.0}
BEFORE = {("kernels", "a"): 1.0, ("kernels", "b"): 1.0, ("steps", "c"): 4.1, ("steps", "old"): 1.0}


def test_ratios_are_of_what_both_runs_have():
    found = run_suites.compare(make_run(NOW), make_run(BEFORE))
    assert found == {
        ("kernels", "a"): (2.0, True),
        ("kernels", "b"): (1.0, False),
        ("steps", "c"): (pytest.approx(4 / 4.1), False),
    }
    lines = run_suites.describe(found, "before.json")
    assert lines[0] == "now / before.json: median times, geometric means of each suite"
    assert lines[1:3] == ["   1.41  kernels (2)", "   0.98  steps (1)"]
    assert lines[3:] == ["1 of 3 changed by 1.25 times or more:", "   2.00  kernels: a"]


def test_a_change_within_the_spread_is_none():
    found = run_suites.compare(make_run(NOW, spread=0.5), make_run(BEFORE, spread=0.5))
    assert not any(apart for _, apart in found.values())


def test_the_last_run_is_the_newest_of_this_machine_and_these_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(run_suites, "SAVED", tmp_path)
    runs = {
        "20260101_000000": make_run(BEFORE),
        "20260102_000000": make_run(NOW),
        "20260103_000000": make_run(BEFORE, node="another"),
        "20260104_000000": make_run(BEFORE, jax="0.11.2"),
        "20260105_000000": make_run(NOW),
    }
    for name, run in runs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    now = tmp_path / "20260105_000000.json"
    assert run_suites.find_last(runs[now.stem], now) == (
        runs["20260102_000000"],
        "20260102_000000.json",
    )
    assert run_suites.find_last(make_run(NOW, node="new"), now) is None


def test_parts_and_runs_that_were_ended_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(run_suites, "SAVED", tmp_path)
    whole, part = make_run(BEFORE), make_run({("steps", "old"): 1.0})
    for name, text in {
        "20260101_000000": json.dumps(whole),
        "20260102_000000": json.dumps(part),
        "20260103_000000": "",
        "20260104_000000": json.dumps(whole)[:50],
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    found = run_suites.find_last(make_run(NOW), tmp_path / "20260105_000000.json")
    assert found == (whole, "20260101_000000.json")


@pytest.mark.parametrize("compared", [True, False])
def test_the_page_is_drawn(compared, tmp_path):
    pytest.importorskip("matplotlib")
    found = run_suites.compare(make_run(NOW), make_run(BEFORE)) if compared else {}
    run_suites.draw(make_run(NOW), found, "before.json" if compared else "", tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"


def test_every_suite_has_a_name():
    conftest = (ROOT / "benchmarks" / "conftest.py").read_text()
    files = sorted(path.stem for path in (ROOT / "benchmarks").glob("test_*.py"))
    assert [name for name in files if f'"{name}": "' not in conftest] == []
