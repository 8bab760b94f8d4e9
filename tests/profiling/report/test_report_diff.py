"""What changed between two reports, as data and as text."""

import dataclasses

import pytest
from html_cases import HOSTILE, ROW, added, hostile, large, row

from txcore.profiling import Report
from txcore.profiling.report.diff import Amount, diff, diff_text, format_signed, summary


def only(before, after):
    (change,) = diff(Report(tuple(before)), Report(tuple(after)))
    return change


def test_added_and_removed():
    change = only([], [ROW])
    assert (change.change, change.name, change.kind) == ("added", "psum/grads.kernel", "all-reduce")
    assert (change.axes, change.dtype, change.origin) == (("data",), "bfloat16", "txcore")
    assert (change.before, change.after) == (Amount(), Amount(1, 1000, 3000))
    assert change.wire_growth == 3000
    gone = only([ROW], [])
    assert (gone.change, gone.wire_growth) == ("removed", -3000)


def test_bytes_are_of_one_call_and_of_all_rows_under_the_key():
    change = only([row(trips=2)], [ROW, row(trips=3, source="other.py:1")])
    assert change.before == Amount(1, 2000, 6000)
    assert change.after == Amount(2, 4000, 12000)
    assert change.change == "grown"
    assert change.places == ("train.py:40", "other.py:1")


@pytest.mark.parametrize(
    "changed, verb",
    [
        ({"wire_bytes": 3001, "payload_bytes": 1}, "grown"),
        ({"wire_bytes": 2999, "payload_bytes": 9999}, "shrunk"),
        ({"payload_bytes": 1001}, "grown"),
        ({"payload_bytes": 999}, "shrunk"),
        ({"op_name": "elsewhere", "wire_dtype": "bfloat16", "source": "train.py:41"}, "same"),
    ],
)
def test_wire_bytes_decide_and_then_the_payload(changed, verb):
    assert only([ROW], [row(**changed)]).change == verb


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "all-gather"},
        {"axes": ("model",)},
        {"dtype": "float32"},
        {"origin": "user"},
        {"tags": ("psum/other",)},
        {"explained": False},
    ],
)
def test_what_makes_another_entry(changed):
    changes = diff(Report((ROW,)), Report((row(**changed),)))
    assert sorted(c.change for c in changes) == ["added", "removed"]


def test_a_moved_line_is_no_change_where_there_is_no_tag():
    change = only([added(source="train.py:40")], [added(source="train.py:55")])
    assert (change.change, change.name, change.places) == ("same", "train.py", ("train.py:55",))
    changes = diff(Report((added(),)), Report((added(source="model.py:40"),)))
    assert {c.name for c in changes} == {"train.py", "model.py"}


def test_the_largest_change_comes_first_and_the_same_last():
    before = (row(tags=("a",)), row(tags=("b",)), row(tags=("c",)), row(tags=("d",)))
    after = (row(tags=("a",)), row(tags=("b",), wire_bytes=9000), row(tags=("d",), wire_bytes=1))
    names = [(c.name, c.change) for c in diff(Report(before), Report(after))]
    assert names == [("b", "grown"), ("c", "removed"), ("d", "shrunk"), ("a", "same")]


def test_text():
    before = Report((row(tags=("a",)), row(tags=("b",)), row(tags=("c",))))
    after = Report((row(tags=("a",), wire_bytes=4000), row(tags=("b",)), added()))
    assert diff_text(diff(before, after)).splitlines() == [
        "   kind        axes  dtype     origin         wire a call  name",
        "----------------------------------------------------------------------",
        "-  all-reduce  data  bfloat16  txcore                3 kB  c",
        "+  all-reduce  data  bfloat16  partitioner!          3 kB  train.py:40",
        "^  all-reduce  data  bfloat16  txcore        3 kB -> 4 kB  a",
        "1 added, 1 removed, 1 grown, 1 same: 9 kB -> 10 kB on the wire of each device in a call",
    ]


def test_text_of_a_change_that_rounding_hides():
    before, after = row(wire_bytes=10**9), row(wire_bytes=10**9 + 5)
    assert "1 GB +5 B  psum/grads.kernel" in diff_text(diff(Report((before,)), Report((after,))))


def test_text_names_one_of_many_places():
    changes = diff(Report(()), Report((added(), added(source="train.py:41"))))
    assert "train.py:40 and 1 more" in diff_text(changes)


def test_text_fits_100_columns():
    wide = dataclasses.replace(
        added(kind="collective-broadcast", axes=("a_rather_long_axis", "another_long_axis")),
        dtype="float8_e4m3fn",
        tags=("psum/" + "very_long." * 20,),
        wire_bytes=10**15,
    )
    narrow = row(tags=wide.tags, wire_bytes=10**9)
    grown = row(tags=wide.tags, wire_bytes=10**9 + 5)
    for reports in (((), (wide,)), ((wide, narrow), (grown,)), ((wide,), large(3).collectives)):
        lines = diff_text(diff(*map(Report, reports))).splitlines()
        assert len(lines) > 2
        assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_make_no_lines_and_no_escapes(text):
    lines = diff_text(diff(Report(()), hostile(text))).splitlines()
    assert len(lines) == 2 + 2 + 1
    assert max(map(len, lines)) <= 100
    assert all(line.isprintable() for line in lines)


def test_nothing_changed():
    changes = diff(Report((ROW,)), Report((row(source="train.py:1"),)))
    assert diff_text(changes) == "no change: 3 kB on the wire of each device in a call"
    assert summary(()) == "no change: 0 B on the wire of each device in a call"


def test_signed():
    assert [format_signed(n) for n in (1500, -1500, 0)] == ["+1.5 kB", "-1.5 kB", "0 B"]
