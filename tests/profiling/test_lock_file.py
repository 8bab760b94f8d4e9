"""The lock file: canonical, one entry a line, refused where damaged, replaced in one step."""

import json
import os
import pathlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from txcore.profiling.lock import Entry, Lock, LockError
from txcore.profiling.lock.file import dumps, read, write

GRADS = Entry("psum/grads", "", "all-reduce", ("data",), "float32", "txcore", 400, 1)
PLAIN = Entry("", 'a "b"é.py', "all-gather", ("data", "model"), "bfloat16", "user", 64, 3, False)
LOCKS = {
    "cpu:8 data=8": Lock("cpu:8 data=8", (PLAIN, GRADS), {"model": 0, "data": 2_000_000}),
    "cuda:h100:8": Lock("cuda:h100:8", ()),
}
TEXT = """\
{
  "format": "txcore-lock",
  "version": 1,
  "targets": {
    "cpu:8 data=8": {
      "budgets": {"data": 2000000, "model": 0},
      "collectives": [
        {"source": "a \\"b\\"\\u00e9.py", "kind": "all-gather", "axes": ["data", "model"], \
"dtype": "bfloat16", "payload_bytes": 64, "trips": 3, "trips_known": false, "origin": "user"},
        {"tag": "psum/grads", "kind": "all-reduce", "axes": ["data"], "dtype": "float32", \
"payload_bytes": 400, "trips": 1, "origin": "txcore"}
      ]
    },
    "cuda:h100:8": {
      "budgets": {},
      "collectives": []
    }
  }
}
"""


def save(tmp_path, text):
    path = tmp_path / "collectives.lock.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_text_is_canonical(tmp_path):
    assert dumps(LOCKS.values()) == TEXT
    assert dumps(reversed(LOCKS.values())) == TEXT
    assert read(save(tmp_path, TEXT)) == LOCKS
    shuffled = json.dumps(json.loads(TEXT), sort_keys=True, indent=7)
    assert dumps(read(save(tmp_path, shuffled)).values()) == TEXT
    assert json.loads(dumps([])) == {"format": "txcore-lock", "version": 1, "targets": {}}


def test_nothing_but_the_file_is_left(tmp_path):
    path = save(tmp_path, "old")
    path.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    write(link, TEXT)
    assert link.is_symlink()
    assert path.read_text() == TEXT
    assert sorted(os.listdir(tmp_path)) == ["collectives.lock.json", "link.json"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = save(tmp_path, "old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("txcore.profiling.lock.file.os.replace", fail)
    with pytest.raises(LockError, match=r"cannot write .*: No space left on device"):
        write(path, TEXT)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["collectives.lock.json"]


def changed(**changes):
    """Return the text with fields of its second entry changed; None takes one away."""
    data = json.loads(TEXT)
    entry = data["targets"]["cpu:8 data=8"]["collectives"][1]
    entry.update(changes)
    data["targets"]["cpu:8 data=8"]["collectives"][1] = {
        name: value for name, value in entry.items() if value is not None
    }
    return json.dumps(data)


BAD = {
    "empty": ("", "is not JSON (Expecting value: line 1 column 1 (char 0))"),
    "truncated": (TEXT[:300], "is not JSON ("),
    "a conflict": (TEXT.replace("    },\n", "<<<<<<< HEAD\n"), "is not JSON ("),
    "not text": (b"\xff\xfe\x00", "is not text"),
    "nested": ("[" * 200_000, "is not JSON (maximum recursion depth exceeded"),
    "a list": ("[]", 'is no lock file, which has "format": "txcore-lock"'),
    "another file": ('{"name": "x"}', "is no lock file"),
    "a later version": (TEXT.replace('version": 1', 'version": 2'),
                        "has version 2, but this txcore reads version 1"),
    "no targets": ('{"format": "txcore-lock", "version": 1}',
                   "is damaged: targets is 'None', and no dict"),
    "a target is no section": ('{"format": "txcore-lock", "version": 1, "targets": {"cpu:8": 3}}',
                               "target 'cpu:8' is '3', and no dict"),
    "a section twice": (TEXT.replace("cuda:h100:8", "cpu:8 data=8"), "has 'cpu:8 data=8' twice"),
    "an entry twice": (changed(tag=None, source='a "b"é.py', kind="all-gather", origin="user",
                               axes=["data", "model"], dtype="bfloat16"),
                       "target 'cpu:8 data=8' has a collective twice"),
    "a budget of text": (TEXT.replace("2000000", '"2MB"'), "budget 'data' is '2MB', and no int"),
    "no bytes": (changed(payload_bytes=None),
                 "collective 2 has unknown or lacks payload_bytes"),
    "unknown field": (changed(wire=3), "collective 2 has unknown or lacks wire"),
    "negative": (changed(payload_bytes=-1), "payload_bytes is '-1', and no int"),
    "a fraction": (changed(trips=1.5), "trips is '1.5', and no int"),
    "a bool": (changed(trips=True), "trips is 'True', and no int"),
    "not a number": (changed(trips=float("nan")), "NaN is no number of bytes or trips"),
    "endless": (changed(trips=float("inf")), "Infinity is no number of bytes or trips"),
    "a version that is a bool": (TEXT.replace('version": 1', 'version": true'), "has version True"),
    "a name of a line and more": (changed(**{"x" * 10**6 + "\n": 1}), "xxxx..: restore"),
    "a name of half a character": (changed(**{"\ud800": 1}), "lacks \\ud800"),
    "axes of numbers": (changed(axes=[1]), "axes is '1', and no str"),
    "tag and source": (changed(source="a.py"), "needs either a tag or a source"),
    "neither": (changed(tag=None), "needs either a tag or a source"),
    "too many digits": (TEXT.replace("400", "4" * 5000),
                        "has a number of 5000 digits"),
    "more than any count": (TEXT.replace("400", "4" * 19), "has a number of 19 digits"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(name, tmp_path):
    text, message = BAD[name]
    path = save(tmp_path, text)
    with pytest.raises(LockError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path} ")
    assert message in str(refused.value)
    assert str(refused.value).endswith(": restore it, or delete and update it")
    assert "\n" not in str(refused.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LockError, match=r"cannot read .*: Is a directory"):
        read(tmp_path)
    with pytest.raises(LockError, match=r"cannot read .*: No such file or directory"):
        read(tmp_path / "absent.json")
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(LockError, match="longer than 16777216 bytes: that is no lock file"):
        read(big)


HOSTILE = {
    "many names, the last one twice": lambda n: (
        "{" + ",".join(f'"{i}":1' for i in range(n // 12)) + ',"0":1}'
    ),
    "nested lists": lambda n: "[" * n,
    "nested sections": lambda n: '{"a":' * (n // 5),
    "one long number": lambda n: "9" * n,
    "one long text": lambda n: f'"{"a" * n}"',
    "many escapes": lambda n: '"' + "\\u0041" * (n // 6) + '"',
    "many sections": lambda n: (
        '{"format":"txcore-lock","version":1,"targets":{'
        + ",".join(f'"{i}":{{"collectives":[]}}' for i in range(n // 25))
        + ',"x":3}}'
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_time_that_grows_with_its_length(kind, tmp_path):
    path = save(tmp_path, HOSTILE[kind](2_000_000))
    start = time.process_time()
    with pytest.raises(LockError) as refused:
        read(path)
    assert time.process_time() - start < 10  # 0.1 to 2 s; what grows with the square takes minutes
    assert len(str(refused.value)) < 400 + len(str(path))


def test_the_limit_is_an_option(tmp_path):
    path = save(tmp_path, TEXT)
    assert read(path, max_bytes=len(TEXT.encode()))
    with pytest.raises(LockError, match="longer than 100 bytes"):
        read(path, max_bytes=100)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_gets_through(tmp_path_factory, data):
    """A damaged file is refused, or read as some lock that can be written again."""
    start = data.draw(st.integers(0, len(TEXT) - 1))
    end = data.draw(st.integers(start, min(len(TEXT), start + 40)))
    text = TEXT[:start] + data.draw(st.text(max_size=5)) + TEXT[end:]
    path = pathlib.Path(tmp_path_factory.getbasetemp()) / "damaged.lock.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        locks = read(path)
    except LockError:
        return
    path.write_text(dumps(locks.values()))
    assert read(path) == locks
