"""The manifest of a checkpoint, read as if somebody had made it: digest right, content wrong."""

import json
import os
import time
from typing import Any

import pytest

from txcore.train.checkpoints import manifest
from txcore.train.checkpoints.manifest import (
    NAME,
    CheckpointError,
    Leaf,
    Position,
    _hash_bytes,
    describe_difference,
    read_manifest,
    verify_files,
    write_manifest,
)

WHOLE: dict[str, Any] = {
    "format": "txcore-checkpoint",
    "version": 1,
    "position": {"steps": 3, "epoch": 0, "batch": 3, "rows": 48, "examples": 48, "seconds": 0.5},
    "leaves": [["stored_params['w']", "float32[3]"]],
    "precision": "float32",
    "files": {"a/b": [3, "ab" * 32]},
    "versions": {"jax": "0.12.0"},
}


def save(folder, text):
    (folder / NAME).write_text(f"{_hash_bytes(text.encode())}\n{text}\n")


def changed(**changes):
    return json.dumps({**WHOLE, **changes})


def at(**changes):
    return changed(position={**WHOLE["position"], **changes})


def test_a_whole_one_is_read(tmp_path):
    save(tmp_path, json.dumps(WHOLE))
    found = read_manifest(tmp_path)
    assert found.position == Position(3, 0, 3, 48, 48, 0.5)
    assert found.leaves == (Leaf("stored_params['w']", "float32[3]"),)
    assert found.files == {"a/b": (3, "ab" * 32)}


def with_leaf(path, kind):
    return changed(leaves=[*WHOLE["leaves"], [path, kind]])


def with_metric(value):
    return changed(metric=["accuracy", "max", 0.125]).replace("0.125", value)


BAD = {
    "a list": ("[]", 'needs an object with "format": "txcore-checkpoint", got []'),
    "no position": (
        json.dumps({k: v for k, v in WHOLE.items() if k != "position"}),
        "needs 'position' in the file, got none",
    ),
    "a name too many": (changed(step=3), "got 'step'"),
    "a name too many within": (at(step=3), "in position, got 'step'"),
    "true as version": (changed(version=True), "needs version 1 for this txcore, got True"),
    "a long format": (changed(format="f" * 999), f"got '{'f' * 76}..."),
    "steps of text": (at(steps="3"), "needs a whole number of 0 to 999999999999999999 as "
                      "position['steps'], got '3'"),
    "half a step": (at(steps=3.5), "as position['steps'], got 3.5"),
    "true steps": (at(steps=True), "as position['steps'], got True"),
    "steps before the first": (at(steps=-1), "as position['steps'], got -1"),
    "endless steps": (at(steps=0.25).replace("0.25", "1e400"), "needs finite numbers, got 1e400"),
    "endless seconds": (at(seconds=0.5).replace("0.5", "1e400"), "needs finite numbers, got 1e400"),
    "an endless metric": (with_metric("1e400"), "needs finite numbers, got 1e400"),
    "seconds of many digits": (at(seconds=0.5).replace("0.5", f"0.{'5' * 99}"), "finite numbers"),
    "seconds before the first": (at(seconds=-0.5), "needs seconds of at least 0, got -0.5"),
    "no number of seconds": (at(seconds=float("nan")), "needs finite numbers, got NaN"),
    "more batches than steps": (at(batch=4), "needs at most its 3 steps as batch of a pass, got 4"),
    "steps of many digits": (
        at(steps=7).replace('"steps": 7', f'"steps": {"9" * 5000}'),
        "needs numbers of at most 18 digits, got one of 5000",
    ),
    "a leaf of one text": (changed(leaves=[["w"]]), "needs 2 values as leaves[0], got 1"),
    "a leaf of numbers": (changed(leaves=[[1, 2]]), "needs text as leaves[0][0], got 1"),
    "a leaf twice": (with_leaf(*WHOLE["leaves"][0]), "needs each leaf once, got one twice"),
    "no such dtype": (with_leaf("x", "float99[3]"), "needs a dtype and dims of 'x', got 'float99["),
    "a dtype of no numbers": (with_leaf("x", "object[3]"), "got 'object[3]'"),
    "a dtype of many": (with_leaf("x", "f4,f4[3]"), "got 'f4,f4[3]'"),
    "no dims": (with_leaf("x", "float32"), "got 'float32'"),
    "dims before 0": (with_leaf("x", "float32[-3]"), "got 'float32[-3]'"),
    "a scale of many": (with_leaf("loss_scaling.scale", "float32[3]"), "needs a scalar as 'loss_"),
    "a scale of keys": (with_leaf("loss_scaling.scale", "key<fry>[]"), "needs a scalar as 'loss_"),
    "no such precision": (changed(precision="float99"), "a dtype as precision, got 'float99'"),
    "an escape": (with_leaf("x", "\x1b[31m"), "got '\\x1b[31m'"),
    "files in a list": (changed(files=[]), "needs an object as files, got []"),
    "a size of text": (changed(files={"a": ["3", "x"]}), "as files['a'][0], got '3'"),
    "a name twice": ('{"a": 1, "a": 2}', "needs each name once, got 'a' twice"),
    "nested": ("[" * 100_000, "needs at most 16 levels of brackets, got more"),
    "many values": ("[" + "{}," * 2_000_000 + "{}]", "needs at most 4000000 commas and brackets"),
    "versions of numbers": (changed(versions={"jax": 1}), "as versions['jax'], got 1"),
    "a mode of no kind": (changed(metric=["a", "most", 1]), "as metric, got a list of 3"),
    "not JSON": (json.dumps(WHOLE)[:-2], "needs JSON, got other text (Expecting"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_one_is_refused(name, tmp_path):
    text, reason = BAD[name]
    save(tmp_path, text)
    with pytest.raises(CheckpointError) as refused:
        read_manifest(tmp_path)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path / NAME} needs ")
    assert reason in said
    assert said.endswith(": use another checkpoint")
    assert len(said) < 400 + len(str(tmp_path))


def test_it_has_the_steps_of_its_folder(tmp_path):
    for name in ("step_00000003", "step_3_kept", "best"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, json.dumps(WHOLE))
        assert read_manifest(tmp_path / name).position.steps == 3
    for name in ("step_00000004", "step_3"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, json.dumps(WHOLE))
        with pytest.raises(CheckpointError, match=rf"needs the steps of its folder, {name}, got 3"):
            read_manifest(tmp_path / name)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(CheckpointError, match=f"{NAME} cannot be read: it is a pipe, and no reg"):
        read_manifest(tmp_path)
    (tmp_path / NAME).unlink()
    save(tmp_path, changed(files={}))
    verify_files(tmp_path, read_manifest(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe was not there when it was saved"):
        verify_files(tmp_path, read_manifest(tmp_path))
    save(tmp_path, changed(files={"pipe": [0, "ab" * 32]}))
    with pytest.raises(CheckpointError, match="it is a pipe, and no regular file"):
        verify_files(tmp_path, read_manifest(tmp_path))


def test_a_file_of_another_size_is_not_read(tmp_path):
    """A terabyte of nothing, which would take an hour."""
    save(tmp_path, changed(files={"a": [3, "ab" * 32]}))
    with open(tmp_path / "a", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="a has 1099511627776 bytes, and had 3 when it was"):
        verify_files(tmp_path, read_manifest(tmp_path))


def test_what_a_file_says_reaches_no_terminal_as_it_is():
    saved = (Leaf("a\x1b[31m", "float32[]"), Leaf("b\u202e", "float32[]"))
    said = describe_difference(saved, (Leaf("b\u202e", "float32[2]"),))
    assert said == (
        "a\\x1b[31m (float32[]) is not in this state; "
        "b\\u202e is float32[] in it and float32[2] in this state"
    )


def test_a_stranger_named_with_an_escape_is_shown(tmp_path):
    save(tmp_path, changed(files={}))
    (tmp_path / "\x1b[2J").touch()
    with pytest.raises(CheckpointError, match=r"damaged: \\x1b\[2J was not there"):
        verify_files(tmp_path, read_manifest(tmp_path))


def test_a_long_one_is_refused_and_the_limit_is_an_option(tmp_path):
    save(tmp_path, json.dumps(WHOLE))
    size = (tmp_path / NAME).stat().st_size
    assert read_manifest(tmp_path, max_bytes=size).precision == "float32"
    with pytest.raises(CheckpointError, match="longer than 100 bytes: that is no manifest"):
        read_manifest(tmp_path, max_bytes=100)


def test_one_that_would_be_refused_for_its_length_is_not_written(tmp_path, monkeypatch):
    """Else a run saves checkpoints that it cannot resume from."""
    facts = (Position(), (Leaf("stored_params['w']", "float32[3]"),), "float32", {})
    write_manifest(tmp_path, *facts)
    size = (tmp_path / NAME).stat().st_size
    monkeypatch.setattr(manifest, "MOST_BYTES", size)
    write_manifest(tmp_path, *facts)
    assert read_manifest(tmp_path, max_bytes=size).leaves == facts[1]
    (tmp_path / NAME).unlink()
    monkeypatch.setattr(manifest, "MOST_BYTES", size - 1)
    text = f"{NAME} needs at most {size - 1} bytes, got {size} for 1 leaves and 0 files: stack the"
    with pytest.raises(CheckpointError, match=text):
        write_manifest(tmp_path, *facts)
    assert not (tmp_path / NAME).exists()


def test_many_names_of_which_one_is_there_twice_take_linear_time(tmp_path):
    save(tmp_path, "{" + ",".join(f'"{i}":1' for i in range(200_000)) + ',"0":1}')
    start = time.process_time()
    with pytest.raises(CheckpointError, match="'0' twice"):
        read_manifest(tmp_path)
    assert time.process_time() - start < 10  # what grows with the square takes minutes
