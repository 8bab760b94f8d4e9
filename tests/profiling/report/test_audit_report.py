"""The table, the verdict and the JSON."""

import dataclasses
import json
import re

import pytest
from jax.sharding import AbstractMesh

from txcore.profiling import Collective, Declared, Report, audit_text
from txcore.profiling.declared.divergence import Divergence
from txcore.profiling.report.numbers import format_bytes
from txcore.profiling.report.rows import PlanLine
from txcore.profiling.report.table import cut_middle

ROW = Collective(
    kind="all-reduce",
    origin="txcore",
    tags=("psum/grads.dense.kernel",),
    axes=("data",),
    group_size=2,
    dtype="float32",
    wire_dtype="float32",
    payload_bytes=1_664_296,
    wire_bytes=1_664_296,
    trips=1,
    source="train.py:40",
    op_name="jit(f)/shard_map/psum",
)
GONE = Declared("all-gather", "all_gather", ("model",), 4, "float32", 64, 1, None, "a.py:3", False)


def with_(**changes):
    return dataclasses.replace(ROW, **changes)


def test_a_proof():
    report = Report((ROW, with_(payload_bytes=4, trips=3)))
    assert report.payload_bytes == 1_664_296 + 12
    assert report.verdict() == (
        "proved: 2 collectives, 1.66 MB payload a call, all declared (2 txcore); nothing was added"
    )
    first, head, *_ = str(report).splitlines()
    assert first == "proved"
    assert head.split() == [
        *("kind", "axes", "n", "dtype", "payload", "wire", "trips", "origin", "tags", "source"),
    ]


def test_a_failure_names_three_and_counts_the_rest():
    bad = with_(origin="partitioner", explained=False, tags=(), note="why")
    verdict = Report((ROW, bad, bad, bad, bad), missing=(GONE,)).verdict()
    assert verdict.startswith(
        "failed: 4 of 5 collectives unexplained: "
        "all-reduce over data at train.py:40 (partitioner: why), "
    )
    assert verdict.endswith("and 1 more; 1 declared but missing: all_gather over model at a.py:3")


def test_ok_and_exact():
    assert Report((ROW,)).exact
    assert not Report((ROW,), checked=False).exact
    for origin in ("autodiff", "opaque"):
        report = Report((with_(origin=origin),))
        assert report.ok
        assert not report.exact
    assert not Report((ROW,), missing=(GONE,)).ok
    assert not Report((with_(explained=False),)).ok


AUTODIFF, OPAQUE = with_(origin="autodiff"), with_(kind="custom-call", origin="opaque")
HANGS = Divergence("hangs", "data", "psum/a", "all-reduce", ("data",), "a.py:3", "cond", "a.py:2")
NOT_PROVED = [
    (
        Report((ROW, AUTODIFF, OPAQUE, OPAQUE)),
        "nothing was added, but 1 is left to autodiff and 2 are hidden in opaque calls",
    ),
    (Report((ROW,), checked=False), "but there is no traced program to compare with"),
    (
        Report((ROW, OPAQUE), checked=False),
        "but there is no traced program to compare with and 1 is hidden in opaque calls",
    ),
    (
        Report((), checked=False),
        "not proved: no collective found, but there is no traced program to compare with",
    ),
]
FAILED = [
    (Report((with_(explained=False),)), "1 of 1 collective unexplained"),
    (Report((AUTODIFF, with_(explained=False)), checked=False), "1 of 2 collectives unexplained"),
    (Report((ROW,), missing=(GONE,)), "1 declared but missing"),
    (Report((ROW,), divergent=(HANGS,)), "1 that not all devices reach"),
    (
        Report((ROW,), plan=(PlanLine("gradients", "all-reduce", ("data",), "float32", 8, 4),)),
        "the plan predicts 8 B",
    ),
]


@pytest.mark.parametrize("report", [Report(()), Report((ROW,))], ids=["nothing", "tagged"])
def test_proved_is_what_is_exact(report):
    check_status(report, "proved")
    assert report.exact


@pytest.mark.parametrize("report, reason", NOT_PROVED, ids=[r for _, r in NOT_PROVED])
def test_not_proved_is_what_has_no_fault_and_is_not_exact(report, reason):
    check_status(report, "not proved")
    assert report.verdict().endswith(reason)
    assert report.ok
    assert not report.exact


@pytest.mark.parametrize("report, reason", FAILED, ids=[r for _, r in FAILED])
def test_failed_is_what_is_not_ok(report, reason):
    check_status(report, "failed")
    assert reason in report.verdict()
    assert not report.ok


def check_status(report, status):
    """Every face of a report begins with its status."""
    assert report.status == status
    assert report.verdict().startswith(f"{status}: ")
    assert re.split(r"[:\n]", str(report))[0] == status
    assert str(report).splitlines()[-1] == report.verdict()
    assert next(iter(report.to_dict().items())) == ("status", status)
    assert json.loads(report.to_json())["status"] == status


def test_an_opaque_call_is_said():
    verdict = Report((ROW, with_(kind="custom-call", origin="opaque"))).verdict()
    assert verdict.endswith("nothing was added, but 1 is hidden in opaque calls")


WIDE = with_(
    kind="collective-permute",
    axes=("a_rather_long_axis", "another_long_axis"),
    group_size=4096,
    dtype="float8_e4m3fn",
    payload_bytes=10**12,
    wire_bytes=2 * 10**11,
    trips=100_000,
    trips_known=False,
    origin="partitioner",
    tags=("psum/transformer.layers.attention.query.kernel", "psum/loss"),
    source="a_module_with_a_very_long_name_indeed.py:12345",
)


@pytest.mark.parametrize("rows", [(ROW,), (WIDE,), (ROW, WIDE), (with_(tags=()),)])
def test_the_table_fits_100_columns(rows):
    _status, *table, _verdict = str(Report(rows)).splitlines()
    assert len(table) == 2 + len(rows)
    assert max(map(len, table)) <= 100


def test_json_is_canonical_and_complete():
    report = Report((ROW,), missing=(GONE,))
    text = report.to_json()
    assert json.loads(text) == json.loads(json.dumps(report.to_dict()))
    row, gone = json.loads(text)["collectives"][0], json.loads(text)["missing"][0]
    assert (row["tags"], row["axes"], gone["axes"]) == (list(ROW.tags), ["data"], ["model"])
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert json.loads(text)["payload_bytes"] == ROW.payload_bytes


@pytest.mark.parametrize(
    "number, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.54 kB"), (999_600, "1 MB"),
     (1_664_296, "1.66 MB"), (123_456_789, "123 MB"), (5 * 10**15, "5e+03 TB")],
)  # fmt: skip
def test_bytes(number, text):
    assert format_bytes(number) == text


def test_shorten_cuts_the_middle():
    assert cut_middle("psum/grads.dense", 16) == "psum/grads.dense"
    assert cut_middle("psum/grads.dense.kernel", 12) == "psum/..ernel"


TEXT = """HloModule m, num_partitions=4
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %r = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add, METADATA
  ROOT %c = f32[8]{0} custom-call(%r), custom_call_target="my_send"
}
"""


@pytest.mark.parametrize(
    "witnesses, origin",
    [
        ('metadata={op_name="jit(f)/shard_map/psum"}', "user"),
        ('metadata={op_name="jit(f)/shard_map/transpose(jvp())/psum_invariant"}', "autodiff"),
        ('metadata={op_name="jit(f)/transpose(jvp())/checkpoint/rematted_computation/psum"}',
         "user"),
        ('frontend_attributes={txcore="psum/x"}, metadata={op_name="jit(f)/psum"}', "txcore"),
        ('frontend_attributes={txcore="psum/x"}', "txcore"),
        ('frontend_attributes={txcore="psum/x"}, metadata={op_name="jit(f)/dot_general"}',
         "partitioner"),
        ('frontend_attributes={is_spmd_generated="true",txcore="psum/x"}, '
         'metadata={op_name="jit(f)/psum"}', "partitioner"),
        ('frontend_attributes={txcore="psum/x"}, '
         'metadata={op_name="jit(f)/(shard_map/psum_invariant:reduce_sum)"}', "partitioner"),
        ('frontend_attributes={txcore="psum/x,psum/y"}, '
         'metadata={op_name="jit(f)/(shard_map/psum_invariant:shard_map/psum)"}', "txcore"),
        ('metadata={op_name="jit(f)/shard_map/(transpose(jvp())/psum_invariant:psum)"}',
         "autodiff"),
        ('metadata={op_name="jit(f)/(shard_map/psum:shard_map/psum)"}', "user"),
        ('metadata={op_name="jit(f)/(/:/)"}', "boundary"),
        ('metadata={op_name="jit(f)/()"}', "boundary"),
        ('metadata={op_name="jit(f)/reduce_sum"}', "partitioner"),
        ('metadata={op_name="jit(f)/shard_map"}', "boundary"),
        ('frontend_attributes={is_spmd_generated="true"}, metadata={op_name="params"}', "boundary"),
        ('frontend_attributes={is_spmd_generated="true"}', "boundary"),
        ('metadata={op_name="jit(f)/reshard"}', "reshard"),
    ],
)  # fmt: skip
def test_the_table_of_origins(witnesses, origin):
    row, call = audit_text(TEXT.replace("METADATA", witnesses)).collectives
    assert row.origin == origin
    assert row.explained == (row.origin not in ("partitioner", "boundary", "unknown"))
    assert (call.kind, call.origin, call.explained) == ("custom-call", "opaque", True)
    assert call.note == "custom call my_send can communicate unseen"


def test_a_dumps_axes_are_named_by_the_mesh_that_is_given():
    mesh = AbstractMesh((2, 2), ("data", "model"))
    row = audit_text(TEXT, mesh=mesh).collectives[0]
    assert (row.axes, row.group_size) == (("model",), 2)
    assert audit_text(TEXT).collectives[0].axes == ()
    assert not audit_text(TEXT).checked


def test_an_unreadable_line_fails_the_proof():
    report = audit_text(TEXT.replace("replica_groups={{0,1},{2,3}}", "replica_groups=?"))
    assert [c.origin for c in report.unexplained] == ["unknown"]
    assert "unknown replica groups" in str(report)


@pytest.mark.parametrize("text", ["", "hello\nworld", "{}"])
def test_text_without_a_module_is_refused(text):
    with pytest.raises(ValueError, match="begins with 'HloModule', but got"):
        audit_text(text)


def test_what_is_no_text_is_refused():
    with pytest.raises(TypeError, match="audit_text needs HLO text, but got a bytes"):
        audit_text(b"HloModule m")
