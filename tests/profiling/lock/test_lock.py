"""What a lock holds, what counts as growth, how it prints, and budgets: on reports made by hand."""

import dataclasses

import pytest

from txcore.profiling import Collective, Declared, Fate, Report
from txcore.profiling.lock import LockError, check, compare, lock_of, update
from txcore.profiling.lock.diff import write_changes

MESH = (("data", 4), ("model", 2), ("pipe", 1))
PSUM = Declared(
    kind="all-reduce", primitive="psum", axes=("data",), group_size=4, dtype="float32",
    payload_bytes=400, trips=1, tag="psum/grads.w", source="train.py:40", autodiff=False,
)  # fmt: skip
ROW = Collective(
    kind="all-reduce", origin="txcore", tags=("psum/grads.w",), axes=("data",), group_size=4,
    dtype="float32", wire_dtype="float32", payload_bytes=400, wire_bytes=600, trips=1,
    source="train.py:40", op_name="jit(f)/shard_map/psum",
)  # fmt: skip


def declared(**changes):
    return dataclasses.replace(PSUM, **changes)


def row(**changes):
    return dataclasses.replace(ROW, **changes)


def report_of(*wanted, rows=None, mesh=MESH, **changes):
    """A proved report: one row for each declaration, unless rows are given."""
    fates = tuple(Fate(d, ("kept",), (i,)) for i, d in enumerate(wanted))
    like = (row(payload_bytes=d.payload_bytes, trips=d.trips) for d in wanted)
    found = tuple(like) if rows is None else rows
    return Report(found, fates=fates, mesh=mesh, target="cpu:8", **changes)


def entries(report):
    return [
        (e.tag or e.source, e.kind, e.axes, e.dtype, e.origin, e.payload_bytes, e.trips)
        for e in lock_of(report).entries
    ]


def test_an_entry_is_a_purpose_not_an_op():
    """One purpose is one entry, whatever the number of its arrays and lines."""
    report = report_of(
        PSUM,
        declared(payload_bytes=40, trips=10, source="train.py:99"),
        declared(tag=None, dtype="bfloat16", payload_bytes=6),
        declared(tag=None, autodiff=True, payload_bytes=8, source="train.py:7"),
        declared(tag=None, kind="all-gather", axes=("model", "data"), group_size=8),
    )
    assert entries(report) == [
        ("train.py", "all-gather", ("data", "model"), "float32", "user", 400, 1),
        ("train.py", "all-reduce", ("data",), "bfloat16", "user", 6, 1),
        ("train.py", "all-reduce", ("data",), "float32", "autodiff", 8, 1),
        ("psum/grads.w", "all-reduce", ("data",), "float32", "txcore", 400 + 400, 10),
    ]
    assert lock_of(report).target == "cpu:8 data=4,model=2,pipe=1"
    assert lock_of(report).entries[-1].places == ("train.py:40", "train.py:99")


def test_one_unknown_loop_makes_the_sum_unknown():
    report = report_of(PSUM, declared(trips_known=False), declared(tag="known"))
    assert [(e.tag, e.trips_known) for e in lock_of(report).entries] == [
        ("known", True),
        ("psum/grads.w", False),
    ]


def test_what_sends_nothing_is_left_out():
    report = report_of(
        declared(axes=("pipe",), group_size=1),
        declared(live=False),
        declared(axes=("pipe", "data"), tag="kept"),
    )
    assert [(e.tag, e.axes) for e in lock_of(report).entries] == [("kept", ("data",))]


MERGED = row(tags=("psum/grads.w", "psum/b"), payload_bytes=440, wire_dtype="bfloat16")


@pytest.mark.parametrize(
    "fates, rows",
    [
        ([("kept", (0,)), ("kept", (1,))], (ROW, row(tags=("psum/b",), payload_bytes=40))),
        ([("combined", (0,)), ("combined", (0,))], (MERGED,)),
        ([("split", (0, 1)), ("promoted", (2,))], (row(payload_bytes=200),) * 3),
        ([("deduplicated", ()), ("hoisted", (0,))], (ROW,)),
    ],
)
def test_what_the_compiler_does_to_it_does_not_matter(fates, rows):
    both = [PSUM, declared(tag="psum/b", payload_bytes=40)]
    found = tuple(Fate(d, (fate,), places) for d, (fate, places) in zip(both, fates, strict=True))
    report = Report(rows, fates=found, mesh=MESH, target="cpu:8")
    assert lock_of(report) == lock_of(report_of(*both))


def test_rows_without_a_declaration_are_locked_too():
    opaque = row(
        kind="custom-call", origin="opaque", tags=(), axes=(), dtype="", payload_bytes=0,
        wire_bytes=0, trips=3, source="ring.py:5",
    )  # fmt: skip
    assert entries(report_of(PSUM, rows=(ROW, opaque))) == [
        ("ring.py", "custom-call", (), "", "opaque", 0, 3),
        ("psum/grads.w", "all-reduce", ("data",), "float32", "txcore", 400, 1),
    ]
    reshard = report_of(declared(tag=None, primitive="reshard"))
    assert [e[4] for e in entries(reshard)] == ["reshard"]


def test_what_failed_or_was_not_compared_is_not_locked():
    bad = row(explained=False, origin="partitioner")
    with pytest.raises(LockError, match="a program whose audit has not failed: failed: 1 of 1"):
        lock_of(report_of(rows=(bad,)))
    with pytest.raises(LockError, match="audit the function with its arguments"):
        lock_of(report_of(rows=(ROW,), checked=False))


OLD = report_of(PSUM, declared(tag="loss", payload_bytes=4))
NOW = {
    "the same": ([{}, {"tag": "loss", "payload_bytes": 4}], "", False),
    "another line": ([{"source": "b.py:1"}, {"tag": "loss", "payload_bytes": 4}], "", False),
    "more bytes": ([{"payload_bytes": 401}, {"tag": "loss", "payload_bytes": 4}], "~", True),
    "fewer bytes": ([{"payload_bytes": 399}, {"tag": "loss", "payload_bytes": 4}], "~", False),
    "more executions of as much": (
        [{"payload_bytes": 100, "trips": 4}, {"tag": "loss", "payload_bytes": 4}], "~", True),
    "unknown executions": (
        [{"trips_known": False}, {"tag": "loss", "payload_bytes": 4}], "~", True),
    "gone": ([{}], "-", False),
    "new": ([{}, {"tag": "loss", "payload_bytes": 4}, {"tag": "z"}], "+", True),
    "a worse origin": (
        [{"tag": None, "autodiff": True}, {"tag": "loss", "payload_bytes": 4}], "+-", True),
    "another axis": ([{"axes": ("model",)}, {"tag": "loss", "payload_bytes": 4}], "-+", True),
    "another dtype": ([{"dtype": "float64"}, {"tag": "loss", "payload_bytes": 4}], "-+", True),
    "another kind": (
        [{"kind": "all-gather"}, {"tag": "loss", "payload_bytes": 4}], "+-", True),
}  # fmt: skip


@pytest.mark.parametrize("name", NOW)
def test_growth(name, tmp_path):
    wanted, signs, grew = NOW[name]
    now = report_of(*(declared(**changes) for changes in wanted))
    changes = compare(lock_of(OLD), lock_of(now))
    assert "".join(change.sign for change in changes) == signs
    assert any(change.grew for change in changes) == grew
    path = tmp_path / "lock.json"
    assert update(path, OLD).ok
    assert check(path, now).ok == (not grew)
    assert check(path, now, exact=True).ok == (not signs)


DIFF = """\
+ model.py      all-reduce  data+model  float32             400 B        x1+  user    model.py:7
- gone          all-reduce  data        float32             400 B         x1  txcore
~ less          all-reduce  data        float32         2 kB -1 B         x1  txcore  train.py:40
~ psum/grads.w  all-reduce  data        float32  400 B -> 16.6 MB  x1 -> x10  txcore  train.py:40
lock: 2 of 4 changed entries grew: review, then update the lock"""


def test_a_diff_to_read(tmp_path):
    path = tmp_path / "lock.json"
    update(path, report_of(PSUM, declared(tag="gone"), declared(tag="less", payload_bytes=2000)))
    outcome = check(
        path,
        report_of(
            declared(payload_bytes=1_664_296, trips=10),
            declared(tag="less", payload_bytes=1999),
            declared(tag=None, axes=("data", "model"), source="model.py:7", trips_known=False),
        ),
    )
    assert outcome.text == DIFF


def test_lines_are_never_longer_than_100_columns():
    def long(size, trips):
        return report_of(
            declared(
                tag=f"psum/{'layer.' * 40}w", kind="ragged-all-to-all", dtype="float8_e4m3fnuz",
                axes=("data_outer_axis", "data_inner_axis"), payload_bytes=size, trips=trips,
                source=f"{'module' * 20}.py:123456",
            ),
            mesh=(),
        )  # fmt: skip

    changes = compare(lock_of(long(10**15, 1000)), lock_of(long(10**15 + 10**11, 100000)))
    (line,) = write_changes(changes)
    assert len(line) <= 100
    assert line.startswith("~ psu..")
    assert write_changes(()) == []


def test_shrinking_passes_and_says_how_to_keep_it(tmp_path):
    path = tmp_path / "lock.json"
    update(path, OLD)
    less = report_of(PSUM)
    assert check(path, less).text.endswith(
        "lock: nothing grew; 1 smaller or gone: update the lock to keep that"
    )
    assert check(path, less, exact=True).text.endswith(
        "lock: 1 smaller or gone, and it has to be exact: update the lock"
    )
    assert update(path, less).changed
    assert check(path, less, exact=True).text == (
        "lock: 1 entry as locked for cpu:8 data=4,model=2,pipe=1"
    )


def test_what_is_not_ok_fails_with_its_table(tmp_path):
    path = tmp_path / "lock.json"
    bad = report_of(rows=(row(explained=False, origin="partitioner"),))
    assert update(path, bad) == dataclasses.replace(update(path, bad), ok=False, text=str(bad))
    assert not path.exists()
    update(path, OLD)
    assert not check(path, bad).ok
    assert check(path, bad).text == str(bad)


def test_a_target_of_its_own_has_a_section_of_its_own(tmp_path):
    path = tmp_path / "lock.json"
    update(path, OLD)
    tpu = dataclasses.replace(OLD, target="tpu:v5e:2x4")
    with pytest.raises(LockError, match=r"section 'tpu:v5e:2x4 data=4.*but has cpu:8 data=4"):
        check(path, tpu)
    before = path.read_text()
    assert update(path, tpu).ok
    assert check(path, tpu).ok
    assert check(path, OLD, exact=True).ok
    assert len(path.read_text()) > len(before)


def budgeted(path, sent, most, axis="data", **changes):
    rows = (row(wire_bytes=sent, **changes),)
    return update(path, report_of(PSUM, rows=rows), budgets={axis: most})


def test_a_budget_is_bytes_on_the_wire_in_one_call(tmp_path):
    path = tmp_path / "lock.json"
    refused = budgeted(path, 1_000_000, 2_999_999, trips=3)
    assert not refused.ok
    assert refused.text.splitlines() == [
        "over budget: each device sends 3,000,000 B a call over data, at most 2,999,999 B are "
        "allowed",
        f"{path} is left as it was",
    ]
    assert not path.exists()
    assert budgeted(path, 1_000_000, 3_000_000, trips=3).ok


def test_budgets_are_kept_changed_and_taken_away(tmp_path):
    path = tmp_path / "lock.json"
    budgeted(path, 600, 600)
    assert update(path, OLD, budgets={"model": 10_000}).ok is False  # two rows: 1,200 B over data
    over = report_of(PSUM, rows=(row(wire_bytes=601),))
    assert not check(path, over).ok
    assert not update(path, over).ok
    assert '"budgets": {"data": 600}' in path.read_text()
    assert update(path, over, budgets={"data": 700, "model": 0}).ok
    assert '"budgets": {"data": 700, "model": 0}' in path.read_text()
    assert update(path, over, budgets={"data": None}).ok
    assert '"budgets": {"model": 0}' in path.read_text()


@pytest.mark.parametrize("axes", [("data", "model"), ()])
def test_what_goes_over_several_axes_or_none_of_them_counts_for_each(tmp_path, axes):
    refused = budgeted(tmp_path / "lock.json", 601, 600, axis="model", axes=axes)
    assert "sends 601 B a call over model" in refused.text


def test_a_loop_of_unknown_length_has_no_budget(tmp_path):
    refused = budgeted(tmp_path / "lock.json", 1, 600, trips_known=False)
    assert not refused.ok
    assert refused.text.startswith(
        "no proof of the budget of data: the all-reduce at train.py:40 runs in a loop of unknown"
    )


def test_a_budget_of_no_axis(tmp_path):
    with pytest.raises(LockError, match="which has data, model, pipe, but got 'modle'"):
        budgeted(tmp_path / "lock.json", 1, 600, axis="modle")
    with pytest.raises(LockError, match="which is none, but got 'data'"):
        update(tmp_path / "lock.json", report_of(mesh=()), budgets={"data": 1})
    path = tmp_path / "edited.json"
    budgeted(path, 1, 600)
    path.write_text(path.read_text().replace('{"data": 600}', '{"modle": 600}'))
    with pytest.raises(LockError, match="but got 'modle'"):
        check(path, OLD)
    assert update(path, OLD, budgets={"modle": None}).ok
    assert '"budgets": {}' in path.read_text()


def test_opaque_calls_count_nothing_but_are_locked(tmp_path):
    path = tmp_path / "lock.json"
    budgeted(path, 600, 600)
    opaque = row(
        kind="custom-call", origin="opaque", tags=(), axes=(), dtype="", payload_bytes=0,
        wire_bytes=0, trips=1, trips_known=False,
    )  # fmt: skip
    outcome = check(path, report_of(PSUM, rows=(ROW, opaque)))
    assert not outcome.ok
    assert outcome.text.splitlines() == [
        "+ train.py  custom-call  -  -  0 B  x1+  opaque  train.py:40",
        "lock: 1 of 1 changed entries grew: review, then update the lock",
    ]
