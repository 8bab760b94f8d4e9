"""Loggers that write files: what is in them, runs that go on, and disks that are full."""

import csv
import json
import logging
import math
import os
import signal
import subprocess
import sys

import checkpoint_cases as cases
import numpy as np
import pytest
import toys
from processes import rank_environment
from tensorboard_events import read_events

import txcore as tx
from txcore.train.event_file import encode_scalars, frame

FILES = {"JSONL": "log.jsonl", "CSV": "log.csv", "TensorBoard": "events"}


def make(name, folder):
    """Return a logger that writes into a folder."""
    return getattr(tx.loggers, name)(folder / FILES[name])


def record(kind, step, begun=0, **metrics):
    return tx.loggers.Record(
        kind, step, 100, metrics, float(step), 8 * step, 1.0, (begun, float(begun), 8 * begun)
    )


def keys(name, folder):
    """Return (kind, step, loss) of what a log holds, as another program reads it."""
    path = folder / FILES[name]
    if name == "JSONL":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [(row["kind"], row["step"], row["metrics"].get("loss")) for row in rows]
    if name == "CSV":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(None not in row and None not in row.values() for row in rows), "all are as long"
        return [(r["kind"], int(r["step"]), float(r["loss"]) if r["loss"] else None) for r in rows]
    found = []
    for file in sorted(path.iterdir()):
        for step, scalars, _, started in read_events(file):
            if started:  # what TensorBoard does: drop what it has from there on
                found = [row for row in found if row[1] < step]
            found += [("step", step, scalars["train/loss"])] if "train/loss" in scalars else []
            found += [("eval", step, scalars["eval/loss"])] if "eval/loss" in scalars else []
    return found


def train(logger, until, folder=None, **options):
    """Train to a step, saving every third where there is a folder."""
    engine = cases.engine(1)
    engine.loggers = logger if isinstance(logger, list) else [logger]
    state = cases.start(engine) if hasattr(cases, "start") else None
    checkpoints = tx.Checkpoints(folder, every=3) if folder else None
    return engine.fit(
        cases.step, state, cases.batches, steps=until, checkpoints=checkpoints, **options
    )


@pytest.mark.parametrize("name", FILES)
def test_a_log_holds_every_record_once(name, tmp_path):
    losses = []
    logs = [make(name, tmp_path), lambda r: losses.append((r.kind, r.step, r.metrics.get("loss")))]
    train(logs, 6, evaluate=lambda state: {"loss": np.float32(0.5)}, eval_every=3)
    wanted = [row for row in losses if name != "TensorBoard" or row[0] != "end"]
    assert [row[:2] for row in losses if row[0] != "step"] == [("eval", 3), ("eval", 6), ("end", 6)]
    found = keys(name, tmp_path)
    assert [row[:2] for row in found] == [row[:2] for row in wanted]
    for (*_, loss), (*_, told) in zip(found, wanted, strict=True):
        assert loss == (np.float32(told) if name == "TensorBoard" and told else told)


@pytest.mark.parametrize("name", FILES)
def test_a_run_that_goes_on_has_each_step_once(name, tmp_path, caplog):
    """5 steps of which 3 are saved, then on to 7 in another process: 4 and 5 are made again."""
    first, second = make(name, tmp_path), make(name, tmp_path)
    for step in range(1, 6):
        first(record("step", step, loss=1.0))
    with caplog.at_level(logging.WARNING, "txcore"):
        for step in range(4, 8):
            second(record("step", step, 3, loss=2.0))
    second(record("eval", 7, 3, loss=3.0))
    steps = [("step", step, 1.0) for step in (1, 2, 3)]
    steps += [("step", step, 2.0) for step in (4, 5, 6, 7)]
    assert keys(name, tmp_path) == [*steps, ("eval", 7, 3.0)]
    if name == "TensorBoard":
        assert toys.messages(caplog) == []
        return
    path = tmp_path / FILES[name]
    assert toys.messages(caplog) == [
        f"txcore: {path} had rows of later steps than 3, after which this run goes on: they are "
        f"in {path.name}.old now"
    ]
    kept = path.with_name(f"{path.name}.old").read_text().splitlines()
    assert len(kept) == 2 + (name == "CSV"), "the rows of steps 4 and 5, under their head"
    assert all("1.0" in row for row in kept[-2:])


@pytest.mark.parametrize("name", FILES)
def test_a_second_fit_goes_on_in_the_log(name, tmp_path):
    log = make(name, tmp_path)
    for step in (1, 2):
        log(record("step", step, loss=1.0))
    log(record("end", 2))
    log(record("step", 3, 2, loss=1.0))
    wanted = [("step", 1, 1.0), ("step", 2, 1.0), ("end", 2, None), ("step", 3, 1.0)]
    assert keys(name, tmp_path) == [
        row for row in wanted if name != "TensorBoard" or row[0] != "end"
    ]
    assert not list(tmp_path.glob("*.old"))


@pytest.mark.parametrize("name", FILES)
def test_a_finished_run_that_is_started_again_adds_nothing(name, tmp_path):
    first, again = make(name, tmp_path), make(name, tmp_path)
    for log, begun in ((first, 0), (again, 2)):
        for step in range(begun + 1, 3):
            log(record("step", step, begun, loss=1.0))
        log(record("eval", 2, begun, loss=3.0))
        log(record("end", 2, begun))
    wanted = [("step", 1, 1.0), ("step", 2, 1.0), ("eval", 2, 3.0), ("end", 2, None)]
    found = keys(name, tmp_path)
    assert found == wanted[: 3 if name == "TensorBoard" else 4]


@pytest.mark.parametrize("name", FILES)
def test_a_run_that_starts_anew_loses_nothing_of_the_one_before(name, tmp_path):
    for loss in (1.0, 2.0):
        log = make(name, tmp_path)
        for step in (1, 2):
            log(record("step", step, loss=loss))
    assert keys(name, tmp_path) == [("step", 1, 2.0), ("step", 2, 2.0)]
    if name != "TensorBoard":
        (old,) = tmp_path.glob("*.old")
        assert old.read_text().count("step") >= 2


class Full:
    """A file of which each write reaches the disk in part, and fails."""

    def __init__(self, file):
        self._file = file

    def write(self, data):
        self._file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("failing", [1, 3])
def test_a_part_that_a_full_disk_took_is_taken_out(name, failing, tmp_path, monkeypatch):
    log, module = make(name, tmp_path), type(tmp_path)
    opened = module.open
    for step in range(1, 6):
        one = record("step", step, loss=1.0)
        if step != failing:
            log(one)
            continue
        with monkeypatch.context() as patch:
            patch.setattr(
                module,
                "open",
                lambda path, mode="r", **o: (
                    Full(opened(path, mode, **o)) if mode == "ab" else opened(path, mode, **o)
                ),
            )
            with pytest.raises(OSError, match="No space left"):
                log(one)
    left = [("step", step, 1.0) for step in range(1, 6) if step != failing]
    assert keys(name, tmp_path) == left


@pytest.mark.parametrize("name", ["JSONL", "CSV"])
@pytest.mark.parametrize("text", ["what is this\n", "a,b\n1,2\n", '{"step": 3}\n'])
def test_a_file_of_something_else_is_refused(name, text, tmp_path):
    path = tmp_path / FILES[name]
    path.write_text(text)
    needs = "a log that goes on needs rows of its own|CSV needs a file whose columns begin with"
    with pytest.raises(ValueError, match=f"({needs}).* in {path}: give another path"):
        make(name, tmp_path)(record("step", 1, loss=1.0))
    assert path.read_text() == text


def test_columns_are_added_where_metrics_come_later(tmp_path):
    log = make("CSV", tmp_path)
    log(record("step", 1, loss=1.0))
    log(record("eval", 1, **{"a,b": 0.5, "norms": {"w": [1.0, math.nan]}, "new\nline": True}))
    again = make("CSV", tmp_path)
    again(record("step", 2, 1, loss=math.inf, more=3))
    with (tmp_path / FILES["CSV"]).open(newline="") as file:
        head, *rows = csv.reader(file)
    fixed = ["kind", "step", "seconds", "examples", "compile_seconds"]
    assert head == [*fixed, "loss", "a,b", "new\\nline", "norms/w/0", "norms/w/1", "more"]
    assert [len(row) for row in rows] == [len(head)] * 3
    assert rows[0][5:] == ["1.0", "", "", "", "", ""]
    assert rows[1][5:] == ["", "0.5", "True", "1.0", "nan", ""]
    assert rows[2][5:] == ["inf", "", "", "", "", "3"]


def test_a_metric_called_as_a_figure_of_the_record_is_kept(tmp_path):
    one = record("step", 2, seconds=0.25, examples=3.0, examples_per_second=7.0)
    make("CSV", tmp_path)(one)
    with (tmp_path / FILES["CSV"]).open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["seconds"], row["metrics/seconds"]) == ("2.0", "0.25")
    assert (row["examples"], row["metrics/examples"]) == ("16", "3.0")
    make("TensorBoard", tmp_path)(one)
    (file,) = (tmp_path / "events").iterdir()
    assert read_events(file)[1][1]["train/examples_per_second"] == 7.0


def test_the_bytes_of_an_event():
    """As the package tensorboard writes this event: SerializeToString, and its RecordWriter."""
    event = encode_scalars(1.5, 300, {"train/loss": 0.25})
    message = bytes.fromhex("09000000000000f83f10ac022a130a110a0a747261696e2f6c6f7373150000803e")
    assert event == frame(message)
    assert frame(b"abc").hex() == "0300000000000000" + "b099490e" + "616263" + "6e57f121"


def test_numbers_that_float32_does_not_have(tmp_path):
    log = make("TensorBoard", tmp_path)
    log(record("step", 1 << 40, loss=1e300, low=-1e300, none=math.nan, flag=True, text="no"))
    (file,) = (tmp_path / "events").iterdir()
    _, (step, scalars, _, _) = read_events(file)
    assert step == 1 << 40
    assert scalars.pop("train/examples_per_second") == 8.0
    assert math.isnan(scalars.pop("train/none"))
    assert scalars == {"train/loss": math.inf, "train/low": -math.inf, "train/flag": 1.0}


def test_event_files_are_in_the_order_of_their_runs(tmp_path):
    for begun in range(3):
        make("TensorBoard", tmp_path)(record("step", begun + 1, begun, loss=1.0))
    files = sorted((tmp_path / "events").iterdir())
    assert [read_events(file)[-1][0] for file in files] == [1, 2, 3]
    assert [event[2:] for event in read_events(files[0])] == [("brain.Event:2", False), ("", False)]
    assert [event[0] for event in read_events(files[2]) if event[3]] == [3]


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import pathlib, test_loggers as t
folder = pathlib.Path({folder!r})
logs = [t.make(name, folder) for name in t.FILES]
def kill(record):
    if record.step == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
t.train([*logs, kill], 12, folder / "saved")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_has_lost_no_step_that_was_told_and_goes_on(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    paths = [path for path in sys.path if "tests" in path or "examples" in path]
    for at, code in ((8, -signal.SIGKILL), (0, 0)):
        script = KILLED.format(paths=paths, folder=str(tmp_path), at=at)
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=rank_environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == code, done.stderr
        last = at or 12
        for name in FILES:
            steps = [step for kind, step, _ in keys(name, tmp_path) if kind == "step"]
            assert steps == list(range(1, last + 1)), name
    assert os.listdir(tmp_path / "saved")
