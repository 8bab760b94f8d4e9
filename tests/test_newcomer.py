"""A newcomer's path: the scripts of docs/your-model.md and docs/ci.md, changed and run."""

import os
import re
import sys

import pytest
from docs_cases import ROOT, blocks, run, saved_files

PAGE = "docs/your-model.md"
MOST_LINES = 15
SAME_LOSSES = """
import importlib

import numpy as np
import pytest


@pytest.mark.parametrize("name", {names})
def test_it_trains_on_four_devices_as_on_one(name):
    before, after = importlib.import_module(f"before_{{name}}"), importlib.import_module(name)
    assert after.engine.mesh.size == 4
    np.testing.assert_allclose(after.metrics["loss"], before.loss, rtol=1e-4)
"""


def read_changes():
    """Return what each diff of the page changes: (file, lines that go, lines that come) a hunk."""
    changes = []
    for text, _ in blocks(PAGE, "diff"):
        hunks = []
        for file, body in re.findall(
            r"^--- .*\n\+\+\+ (.*)\n((?:[-+ @].*\n(?!---))*[-+ @].*\n)", text, re.M
        ):
            for hunk in body.split("@@\n")[1:]:
                lines = hunk.splitlines(keepends=True)
                old, new = ("".join(x[1:] for x in lines if x[0] != sign) for sign in "+-")
                hunks.append((file, old, new))
        changes.append(hunks)
    return changes


def count_new_lines(hunks):
    """Return how many lines a change adds or replaces."""
    return sum(len(set(new.splitlines()) - set(old.splitlines())) for _, old, new in hunks)


def change_files(files, hunks):
    """Return the files with the hunks in them; each has one place."""
    changed = dict(files)
    for file, old, new in hunks:
        text = changed.get(file, "")
        assert text.count(old) == 1 if old else not text or file.startswith("test_"), (file, old)
        changed[file] = text.replace(old, new) if old else text + new
    return changed


def test_no_model_needs_more_than_fifteen_lines():
    counts = [count_new_lines(hunks) for hunks in read_changes()]
    assert len(counts) == 3
    assert max(counts) <= MOST_LINES, counts
    shown = [text for text, _ in blocks(PAGE, "diff")]
    added = [len(re.findall(r"^\+(?!\+\+)", text, re.MULTILINE)) for text in shown]
    assert counts == added


def test_their_own_pytest_proves_them(tmp_path):
    pytest.importorskip("equinox")
    pytest.importorskip("flax")
    before = saved_files(PAGE)
    names = [file.removesuffix(".py") for file in before]
    assert len(names) == 3
    files = before
    for hunks in read_changes():
        files = change_files(files, hunks)
    files |= {f"before_{file}": text for file, text in before.items()}
    files |= saved_files("docs/ci.md")
    files["test_losses.py"] = SAME_LOSSES.format(names=names)
    # Of a step that sends something more, the same test fails.
    more = '"rows": tx.all_gather(batch["y"], "data", invariant=True)}'
    files["more.py"] = re.sub(r'(name="loss"\))\}', rf"\1, {more}", files["plain.py"])
    files["test_more.py"] = files["test_plain.py"].replace("plain", "more")
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    os.environ["JAX_NUM_CPU_DEVICES"], kept = "4", os.environ.get("JAX_NUM_CPU_DEVICES")
    try:
        command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
        done = run(*command, "--update-collectives", cwd=tmp_path)
    finally:
        del os.environ["JAX_NUM_CPU_DEVICES"]
        if kept is not None:
            os.environ["JAX_NUM_CPU_DEVICES"] = kept
    assert re.search(r"1 failed, 7 passed", done.stdout), done.stdout + done.stderr
    assert "FAILED test_more.py" in done.stdout
    assert "all-gather" in done.stdout
    lock = "__collectives__/test_center.test_center_sends_a_mean.lock.json"
    assert (tmp_path / lock).exists()
    assert lock in (ROOT / "docs/ci.md").read_text()
