"""The lock file: canonical, one entry a line, refused where damaged, replaced in one step."""

import json
import os
import pathlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from txcore.profiling.lock import Entry, Lock, LockError
from txcore.profiling.lock.file import format_locks, read_locks, write_file

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
    assert format_locks(LOCKS.values()) == TEXT
    assert format_locks(reversed(LOCKS.values())) == TEXT
    assert read_locks(save(tmp_path, TEXT)) == LOCKS
    shuffled = json.dumps(json.loads(TEXT), sort_keys=True, indent=7)
    assert format_locks(read_locks(save(tmp_path, shuffled)).values()) == TEXT
    assert json.loads(format_locks([])) == {"format": "txcore-lock", "version": 1, "targets": {}}


def test_nothing_but_the_file_is_left(tmp_path):
    path = save(tmp_path, "old")
    path.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    write_file(link, TEXT)
    assert link.is_symlink()
    assert path.read_text() == TEXT
    assert sorted(os.listdir(tmp_path)) == ["collectives.lock.json", "link.json"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = save(tmp_path, "old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("txcore.profiling.lock.file.os.replace", fail)
    with pytest.raises(LockError, match=r"cannot write .*: No space left on device"):
        write_file(path, TEXT)
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


COUNT = "needs a whole number of 0 to 999999999999999999 as targets['cpu:8 data=8']"
SECTION = '{"format": "txcore-lock", "version": 1, "targets": {"cpu:8": %s}}'
BAD = {
    "empty": ("", "needs JSON, got other text (Expecting value: line 1 column 1 (char 0))"),
    "truncated": (TEXT[:300], "needs JSON, got other text ("),
    "a conflict": (TEXT.replace("    },\n", "<<<<<<< HEAD\n"), "needs JSON, got other text ("),
    "not text": (b"\xff\xfe\x00", "needs text in UTF-8, got other bytes at 0"),
    "nested": ("[" * 200_000, "needs at most 16 levels of brackets, got more"),
    "a list": ("[]", 'needs an object with "format": "txcore-lock", got []'),
    "another file": ('{"name": "x"}', 'with "format": "txcore-lock", got none of that name'),
    "another format": ('{"format": "x"}', "with \"format\": \"txcore-lock\", got 'x'"),
    "a later version": (TEXT.replace('version": 1', 'version": 2'),
                        "needs version 1 for this txcore, got 2"),
    "no targets": ('{"format": "txcore-lock", "version": 1}',
                   "needs 'targets' in the file, got none"),
    "a target is no section": (SECTION % "3", "needs an object as targets['cpu:8'], got 3"),
    "a section twice": (TEXT.replace("cuda:h100:8", "cpu:8 data=8"), "got 'cpu:8 data=8' twice"),
    "an entry twice": (changed(tag=None, source='a "b"é.py', kind="all-gather", origin="user",
                               axes=["data", "model"], dtype="bfloat16"),
                       "needs each collective once in targets['cpu:8 data=8'], got 0 again as 1"),
    "a budget of text": (TEXT.replace("2000000", '"2MB"'),
                         f"{COUNT}['budgets']['data'], got '2MB'"),
    "no bytes": (changed(payload_bytes=None),
                 "needs 'payload_bytes' in targets['cpu:8 data=8']['collectives'][1], got none"),
    "unknown field": (changed(wire=3), "in targets['cpu:8 data=8']['collectives'][1], got 'wire'"),
    "an unknown name": (TEXT.replace('"targets"', '"budgets": {"data": 0}, "targets"'),
                        "no name but format, version, targets in the file, got 'budgets'"),
    "an unknown name of a section": (SECTION % '{"collectives": [], "budget": {"data": 0}}',
                                     "but budgets, compiled_with, collectives, allow, proofs in "
                                      "targets['cpu:8'], got 'budget'"),
    "negative": (changed(payload_bytes=-1), "['payload_bytes'], got -1"),
    "a fraction": (changed(trips=1.5), "['trips'], got 1.5"),
    "a bool": (changed(trips=True), "['trips'], got True"),
    "not a number": (changed(trips=float("nan")), "needs finite numbers, got NaN"),
    "endless": (changed(trips=float("inf")), "needs finite numbers, got Infinity"),
    "endless in digits": (changed(trips=0.125).replace("0.125", "1e400"),
                          "needs finite numbers, got 1e400"),
    "a version that is a bool": (TEXT.replace('version": 1', 'version": true'),
                                 "needs version 1 for this txcore, got True"),
    "a name of a line and more": (changed(**{"x" * 10**6 + "\n": 1}), "xxxx...: restore"),
    "a name of half a character": (changed(**{"\ud800": 1}), "got '\\ud800'"),
    "axes of numbers": (changed(axes=[1]), "needs text as targets['cpu:8 data=8']"
                        "['collectives'][1]['axes'][0], got 1"),
    "tag and source": (changed(source="a.py"), "needs either a tag or a source in "
                       "targets['cpu:8 data=8']['collectives'][1], got both"),
    "neither": (changed(tag=None), "got neither"),
    "too many digits": (TEXT.replace("400", "4" * 5000),
                        "needs numbers of at most 18 digits, got one of 5000"),
    "more than any count": (TEXT.replace("400", "4" * 19), "got one of 19"),
    "many values": ("[" + "[]," * 3_000_000, "needs at most 4000000 commas and brackets"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(name, tmp_path):
    text, message = BAD[name]
    path = save(tmp_path, text)
    with pytest.raises(LockError) as refused:
        read_locks(path)
    assert str(refused.value).startswith(f"{path} ")
    assert message in str(refused.value)
    assert str(refused.value).endswith(": restore it, or delete and update it")
    assert "\n" not in str(refused.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LockError, match=r"cannot read .*: Is a directory"):
        read_locks(tmp_path)
    with pytest.raises(LockError, match=r"cannot read .*: No such file or directory"):
        read_locks(tmp_path / "absent.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LockError, match=r"cannot read .*: it is a pipe, and no regular file"):
        read_locks(tmp_path / "pipe")
    with pytest.raises(LockError, match=r"cannot read .*: it is a device, and no regular file"):
        read_locks("/dev/zero")
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(
        LockError, match=r"needs at most 16777216 bytes, but .* is longer: restore it"
    ):
        read_locks(big)


HOSTILE = {
    "many names, the last one twice": lambda n: (
        "{" + ",".join(f'"{i}":1' for i in range(n // 12)) + ',"0":1}'
    ),
    "many names, each twice": lambda n: (
        "{" + ",".join(f'"{i}":1' for i in [*range(n // 24)] * 2) + "}"
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
        read_locks(path)
    assert time.process_time() - start < 10  # 0.1 to 2 s; what grows with the square takes minutes
    assert len(str(refused.value)) < 400 + len(str(path))


def test_the_limit_is_an_option(tmp_path):
    path = save(tmp_path, TEXT)
    assert read_locks(path, max_bytes=len(TEXT.encode()))
    with pytest.raises(LockError, match="at most 100 bytes"):
        read_locks(path, max_bytes=100)


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
        locks = read_locks(path)
    except LockError:
        return
    path.write_text(format_locks(locks.values()))
    assert read_locks(path) == locks
