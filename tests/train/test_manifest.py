"""The manifest of a checkpoint, read as if somebody had made it: digest right, content wrong."""

import json
import time
from typing import Any

import pytest

from txcore.train.checkpoints.manifest import NAME, CheckpointError, Leaf, Position, _sha256, read

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
    (folder / NAME).write_text(f"{_sha256(text.encode())}\n{text}\n")


def changed(**changes):
    return json.dumps({**WHOLE, **changes})


def at(**changes):
    return changed(position={**WHOLE["position"], **changes})


def test_a_whole_one_is_read(tmp_path):
    save(tmp_path, json.dumps(WHOLE))
    found = read(tmp_path)
    assert found.position == Position(3, 0, 3, 48, 48, 0.5)
    assert found.leaves == (Leaf("stored_params['w']", "float32[3]"),)
    assert found.files == {"a/b": (3, "ab" * 32)}


BAD = {
    "a list": ("[]", "required dict as the manifest, got []"),
    "no position": (
        json.dumps({k: v for k, v in WHOLE.items() if k != "position"}),
        "it lacks 'position'",
    ),
    "true as version": (changed(version=True), "required txcore-checkpoint 1, got "),
    "a long format": (changed(format="f" * 999), f"got '{'f' * 76}... 1"),
    "steps of text": (at(steps="3"), "required a number of at least 0 as steps, got '3'"),
    "half a step": (at(steps=3.5), "as steps, got 3.5"),
    "true steps": (at(steps=True), "as steps, got True"),
    "steps before the first": (at(steps=-1), "as steps, got -1"),
    "endless seconds": (at(seconds=0.5).replace("0.5", "1e999"), "as seconds, got inf"),
    "no number of seconds": (at(seconds=float("nan")), "required finite numbers, got NaN"),
    "steps of many digits": (
        at(steps=7).replace('"steps": 7', f'"steps": {"9" * 5000}'),
        "required numbers of at most 18 digits, got one of 5000",
    ),
    "a leaf of one text": (changed(leaves=[["w"]]), "required 2 texts as a leaf, got 1"),
    "a leaf of numbers": (changed(leaves=[[1, 2]]), "required str as a leaf, got 1"),
    "files in a list": (changed(files=[]), "required dict as files, got []"),
    "a size of text": (changed(files={"a": ["3", "x"]}), "as size and digest of 'a', got '3'"),
    "a name twice": ('{"a": 1, "a": 2}', "required each name once, got 'a' twice"),
    "nested": ("[" * 100_000, "maximum recursion depth exceeded"),
    "versions of numbers": (changed(versions={"jax": 1}), "as version of 'jax', got 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_one_is_refused(name, tmp_path):
    text, reason = BAD[name]
    save(tmp_path, text)
    with pytest.raises(CheckpointError) as refused:
        read(tmp_path)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path / NAME} is no manifest of a checkpoint: ")
    assert reason in said
    assert len(said) < 400 + len(str(tmp_path))


def test_a_long_one_is_refused_and_the_limit_is_an_option(tmp_path):
    save(tmp_path, json.dumps(WHOLE))
    size = (tmp_path / NAME).stat().st_size
    assert read(tmp_path, max_bytes=size).precision == "float32"
    with pytest.raises(CheckpointError, match="longer than 100 bytes: that is no manifest"):
        read(tmp_path, max_bytes=100)


def test_many_names_of_which_one_is_there_twice_take_linear_time(tmp_path):
    save(tmp_path, "{" + ",".join(f'"{i}":1' for i in range(200_000)) + ',"0":1}')
    start = time.process_time()
    with pytest.raises(CheckpointError, match="'0' twice"):
        read(tmp_path)
    assert time.process_time() - start < 10  # what grows with the square takes minutes
