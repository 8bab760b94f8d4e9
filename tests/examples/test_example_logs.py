"""What the MNIST script logs and draws, and what it refuses to."""

import importlib.util
import re

import pytest
import train
from tensorboard_events import read_events

FLAGS = ["--model", "dense", "--dataset", "digits", "--devices", "1", "--no-audit"]
FLAGS += ["--steps", "3", "--eval-every", "3", "--warmup", "1"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_all_logs_and_a_picture_at_once(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    logs, picture = tmp_path / "logs", tmp_path / "new" / f"run.{suffix}"
    flags = ["--log-dir", str(logs), "--log-formats", "jsonl", "csv", "tensorboard"]
    assert train.main([*FLAGS, *flags, "--plot", str(picture)]) == 0
    assert sorted(path.name for path in logs.iterdir()) == [
        "tensorboard",
        "train.csv",
        "train.jsonl",
    ]
    assert len((logs / "train.jsonl").read_text().splitlines()) == 5  # three steps, eval, end
    assert len((logs / "train.csv").read_text().splitlines()) == 6  # and the head
    (events,) = (logs / "tensorboard").iterdir()
    told = [(step, set(scalars)) for step, scalars, _, _ in read_events(events)][1:]
    steps = {"train/loss", "train/examples_per_second"}
    assert told == [*[(step, steps) for step in (1, 2, 3)], (3, {"eval/test_accuracy"})]
    drawn = picture.read_bytes()
    assert drawn[:4] == (b"\x89PNG" if suffix == "png" else b"<?xm")
    if suffix == "svg":
        assert {b"step", b"training loss", b"test accuracy, %"} <= set(
            re.findall(rb"<!-- (.*?) -->", drawn)
        )


@pytest.mark.parametrize(
    "flags, text",
    [
        (
            ["--log-formats", "csv"],
            "--log-formats needs --log-dir: without it nothing is logged",
        ),
        (["--plot", "a.gif"], "--plot needs a file that ends in .png or .svg, got 'a.gif'"),
    ],
)
def test_what_cannot_be_logged_is_refused(flags, text, capsys):
    assert train.main([*FLAGS, *flags]) == 2
    assert capsys.readouterr().err == f"train.py: {text}\n"


def test_a_picture_needs_matplotlib(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert train.main([*FLAGS, "--plot", str(tmp_path / "a.png")]) == 2
    needs = "--plot needs matplotlib, found none: install txcore[examples]"
    assert capsys.readouterr().err == f"train.py: {needs}\n"
