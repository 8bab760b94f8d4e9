"""What may happen to checkpoints, and what comes of it: the one before is used, nothing is lost."""

import contextlib
import logging
import os
import pathlib
import re
import shutil
import subprocess
import time

import checkpoint_cases as cases
import jax
import numpy as np
import pytest
import toys
from checkpoint_cases import STEPS, saved, train

import txcore as tx
from txcore.train.checkpoints import folder as checkpoint_folder
from txcore.train.checkpoints import manifest

pytest.importorskip("orbax.checkpoint")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the checkpoints of a run that was stopped after 8 steps."""
    folder = tmp_path_factory.mktemp("made")
    train(folder, steps=8)
    assert saved(folder) == ["step_00000003", "step_00000006", "step_00000008"]
    return folder


@pytest.fixture(scope="module")
def whole():
    return train(None)


@pytest.fixture
def run(made, tmp_path):
    """A copy of it, to damage."""
    return pathlib.Path(shutil.copytree(made, tmp_path / "run"))


def newest(run):
    return run / "step_00000008"


def data_files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d")


def change(path, at=0.5):
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(data)


def resumes_after(run, step, whole, caplog, *said):
    """Check that the run goes on after `step`, that the fault is reported, and the rest equal."""
    with caplog.at_level(logging.WARNING, "txcore"):
        curve, state = train(run)
    assert min(curve.steps) == step + 1
    cases.equal(state, whole[1])
    text = "\n".join(toys.messages(caplog))
    for words in said:
        assert words in text
    assert saved(run)[-1] == f"step_{STEPS:08d}"


def faults():
    """Each way to damage the newest checkpoint, and what is said of it."""

    def flip_data(folder):
        path = max(data_files(folder), key=lambda p: p.stat().st_size)
        change(path)
        return f"{path.relative_to(folder)} has other bytes than were saved"

    def truncate(folder):
        path = max(data_files(folder), key=lambda p: p.stat().st_size)
        size = path.stat().st_size
        os.truncate(path, size // 2)
        return f"{path.relative_to(folder)} has {size // 2} bytes, and had {size} when it was saved"

    def empty(folder):
        os.truncate(folder / "_METADATA", 0)
        return "_METADATA has 0 bytes"

    def delete(folder):
        path = data_files(folder)[0]
        path.unlink()
        return f"{path.relative_to(folder)} is missing"

    def add(folder):
        (folder / "d" / "stranger").write_text("hello")
        return "d/stranger was not there when it was saved"

    def no_manifest(folder):
        (folder / manifest.NAME).unlink()
        return f"{folder} has no txcore.json: it is no txcore checkpoint"

    def flip_manifest(folder):
        change(folder / manifest.NAME, 0.7)
        return "txcore.json is damaged: its first line is not its SHA-256"

    def cut_manifest(folder):
        os.truncate(folder / manifest.NAME, 100)
        return "txcore.json is damaged: its first line is not its SHA-256"

    def another_version(folder):
        path = folder / manifest.NAME
        text = (
            path.read_text().partition("\n")[2].rstrip("\n").replace('"version": 1', '"version": 2')
        )
        path.write_text(f"{manifest._hash_bytes(text.encode())}\n{text}\n")
        return "needs version 1 for this txcore, got 2: use another checkpoint"

    def not_json(folder):
        path = folder / manifest.NAME
        path.write_text(f"{manifest._hash_bytes(b'[' * 100_000)}\n{'[' * 100_000}\n")
        return "needs at most 16 levels of brackets, got more: use another checkpoint"

    def empty_folder(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        return "it is no txcore checkpoint"

    def a_file(folder):
        shutil.rmtree(folder)
        folder.write_text("")
        return "txcore.json cannot be read: Not a directory"

    def flip_each_index(folder):
        change(folder / "manifest.ocdbt", 0.9)
        return "manifest.ocdbt has other bytes than were saved"

    found = locals()
    return [pytest.param(f, id=name) for name, f in found.items()]


@pytest.mark.parametrize("fault", faults())
def test_the_one_before_is_used(fault, run, whole, caplog):
    said = fault(newest(run))
    resumes_after(run, 6, whole, caplog, said, "trying the one before")


def test_a_save_that_was_killed_leaves_no_trace(run, whole, caplog):
    unfinished = run / "step_00000008.orbax-checkpoint-tmp"
    newest(run).rename(unfinished)
    (unfinished / manifest.NAME).unlink()
    resumes_after(run, 6, whole, caplog)
    assert not unfinished.exists()


def test_values_that_are_not_finite_are_not_resumed(tmp_path, whole, caplog):
    def data(epoch):
        made = cases.batches(epoch)
        if epoch == 1:
            made[3] = {**made[3], "y": made[3]["y"] * np.nan}
        return made

    train(tmp_path, steps=8, data=data, on_nonfinite="ignore")
    resumes_after(tmp_path, 6, whole, caplog, "step_00000008 holds values that are not finite, in")


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    """The gradient of the sixth step is NaN, and its loss is not."""

    @tx.step_fn
    def step(state, batch):
        bad = jax.numpy.where(state.step == 5, jax.numpy.nan, 0)
        grads = {**state.stored_params, "w2": state.stored_params["w2"] + bad}
        return state.apply_gradients(grads=grads), {"loss": np.float32(1)}

    def fit(**options):
        engine = toys.engine(2, **options)
        state, data = engine.create_state(toys.params()), cases.batches
        checkpoints = tx.Checkpoints(tmp_path, every=3, keep=1)
        return engine.fit(step, state, data, steps=8, checkpoints=checkpoints)

    text = (
        "the parameters of step 6 are not saved. Not finite after it: params['w2'] (8 of 8 "
        "elements). Lower the learning rate, clip the gradients or look at that batch; "
        "Engine(on_nonfinite='skip') leaves out such steps"
    )
    with pytest.raises(FloatingPointError, match=f"^{re.escape(text)}$"):
        fit()
    assert saved(tmp_path) == ["step_00000003"]
    # The error's advice: a checkpoint of a run that stops is one of a run that skips.
    state = fit(on_nonfinite="skip")
    assert int(state.loss_scaling.skipped_steps) == 3
    assert int(state.step) == 5


def test_damaged_ones_do_not_displace_whole_ones(tmp_path, whole, caplog):
    train(tmp_path, steps=9)
    change(data_files(tmp_path / "step_00000009")[0])
    train(tmp_path, steps=7, keep=1)
    assert saved(tmp_path) == ["step_00000007", "step_00000009"]
    resumes_after(tmp_path, 7, whole, caplog, "step_00000009 is damaged")


def test_the_newest_is_one_that_can_be_used(tmp_path, monkeypatch, caplog):
    train(tmp_path, steps=6)
    change(data_files(tmp_path / "step_00000006")[0])
    monkeypatch.setattr(
        checkpoint_folder, "describe_shortage", lambda directory, need: "it is full"
    )
    text = (
        f"{tmp_path / 'step_00000005'} was not saved: it is full. The newest checkpoint is "
        f"{tmp_path / 'step_00000003'}"
    )
    with pytest.raises(tx.CheckpointError, match=f"^{re.escape(text)}$"):
        train(tmp_path, steps=5)


def test_the_clock_does_not_matter(run, whole, caplog):
    for i, name in enumerate(saved(run)):
        os.utime(run / name, (2e9 - i, 2e9 - i))  # the oldest has the newest time
    resumes_after(run, 8, whole, caplog)
    assert toys.messages(caplog) == []


def test_where_all_are_damaged_nothing_is_started_anew(run):
    for name in saved(run):
        change(data_files(run / name)[0])
    before = saved(run)
    text = (
        f"none of the 3 checkpoints in {run} can be used, the last because "
        f"{run / 'step_00000003'} is damaged: "
    )
    for resume in ("auto", "must"):
        with pytest.raises(tx.CheckpointError, match=f"^{re.escape(text)}.*Nothing was deleted"):
            train(run, resume=resume)
    assert saved(run) == before


def test_what_is_not_ours_is_left_alone(run, whole, caplog):
    (run / "stepped").mkdir()
    (run / "notes.txt").write_text("mine")
    resumes_after(run, 8, whole, caplog)
    assert (run / "stepped").exists()
    assert (run / "notes.txt").exists()


def test_only_names_that_we_make_are_checkpoints(tmp_path):
    for name in ("step_²", "step_9", "step_0000000009", "step_00000009", "step_123456789"):
        (tmp_path / name).mkdir()
    assert checkpoint_folder.list_checkpoints(tmp_path) == ["step_123456789", "step_00000009"]


@pytest.mark.parametrize("place", ["a file", "in a file", "read-only"])
def test_a_folder_that_cannot_be_written(place, tmp_path, request):
    path = tmp_path / "run"
    if place == "read-only":
        path = mount(tmp_path / "ro", "ro,size=1m", request) / "run"
        reason = "Read-only file system"
    else:
        path.write_text("")
        reason = "File exists" if place == "a file" else "Not a directory"
        path = path / "run" if place == "in a file" else path
    text = (
        f"the checkpoint folder {path} cannot be used: {reason}. Give one that this user may write"
    )
    with pytest.raises(tx.CheckpointError, match=f"^{re.escape(text)}$"):
        train(path)


def wait_until(true, seconds=30):
    """Wait, and return whether it has become true."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def mount(path, options, request):
    """Mount a tmpfs, or skip."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(path)], check=False))
    return path


# orbax leaves files and event loops open where its writing fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("told_before", [True, False], ids=["foreseen", "while writing"])
def test_a_full_disk(told_before, tmp_path, request, monkeypatch, caplog, whole):
    """The run goes on; the older checkpoint stays; the end says that the last was not saved."""
    disk = mount(tmp_path / "disk", "size=3m", request)
    if not told_before:
        monkeypatch.setattr(checkpoint_folder, "describe_shortage", lambda directory, need: None)

    def fill(epoch):
        for i, batch in enumerate(cases.batches(epoch)):
            if (epoch, i) == (1, 1):
                first = disk / "run" / "step_00000003" / manifest.NAME
                assert wait_until(first.exists)
                path = disk / "other"
                with open(path, "wb", buffering=0) as other, contextlib.suppress(OSError):
                    while True:
                        other.write(bytes(4096))
            yield batch

    text = r"step_00000014 was not saved: .*\. The newest checkpoint is .*step_00000003$"
    with pytest.raises(tx.CheckpointError, match=text), caplog.at_level(logging.WARNING, "txcore"):
        train(disk / "run", data=fill)
    said = [m for m in toys.messages(caplog) if m.startswith("txcore: ")]
    assert len(said) == 4, "those of 6, 9, 12 and 14; that of 3 is there"
    assert all("the run goes on" in m for m in said)
    reason = "it needs about " if told_before else "No space left on device"
    assert all(reason in m for m in said)
    assert sorted(p.name for p in (disk / "run").iterdir()) == [".lock", "step_00000003"]
    (disk / "other").unlink()
    monkeypatch.undo()
    resumes_after(disk / "run", 3, whole, caplog)


def test_a_disk_that_is_full_for_a_while(tmp_path, request, monkeypatch, whole, caplog):
    answers = iter([None, "it is full", None, None, None])
    monkeypatch.setattr(
        checkpoint_folder, "describe_shortage", lambda directory, need: next(answers)
    )
    with caplog.at_level(logging.WARNING, "txcore"):
        _, state = train(tmp_path)
    cases.equal(state, whole[1])
    assert saved(tmp_path) == ["step_00000009", "step_00000012", "step_00000014"]
    assert toys.messages(caplog) == [
        f"txcore: {tmp_path / 'step_00000006'} was not saved: it is full; the run goes on. The "
        f"newest checkpoint is {tmp_path / 'step_00000003'}"
    ]


def test_a_logger_whose_disk_is_full_for_a_while_does_not_end_the_run(caplog):
    told = []

    def logger(record):
        if record.step in (2, 3):
            raise OSError(28, "No space left on device")
        told.append(record.step)

    engine = toys.engine(1, loggers=[logger])
    state = engine.create_state(toys.params(), extra={"mean": np.float32(0)})
    with caplog.at_level(logging.WARNING, "txcore"):
        engine.fit(cases.step, state, cases.batches(0), steps=4)
    assert told == [1, 4, 4]
    assert toys.messages(caplog) == [
        "txcore: the logger logger failed at step 2, and is called again for the next record: "
        "OSError: [Errno 28] No space left on device"
    ]


def test_loggers_that_are_equal_or_have_no_hash(caplog):
    class Full(list):  # lists are equal where they hold the same, and have no hash
        def __call__(self, record):
            if len(self) == 2:
                self.append(record.step)
                raise OSError(28, "No space left on device")
            self.append(record.step)

    loggers = [Full(), Full()]
    engine = toys.engine(1, loggers=loggers)
    state = engine.create_state(toys.params(), extra={"mean": np.float32(0)})
    engine.fit(cases.step, state, cases.batches(0), steps=4)
    assert loggers == [[1, 2, 3, 4, 4]] * 2
    assert len(toys.messages(caplog)) == 2, "each of them said so"
