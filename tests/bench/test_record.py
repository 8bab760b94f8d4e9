"""The fastest algorithms are written to the tuning file, and found there."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from machine import mesh

import txcore as tx
from txcore import bench
from txcore.bench import measure
from txcore.kernels.dispatch.tuning_file import Entry, read_entries, write_entries
from txcore.parallel.gradients import choice, measured


def row(algorithm, seconds, size=4096, dtype="float32", wrong=0):
    ranks = np.array([[seconds, seconds, seconds]])
    operation = dataclasses.replace(bench.OPERATIONS["pmean"], algorithm=algorithm)
    return measure._make_row(operation, dtype, size // 4, 2, ranks, wrong)


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("TXCORE_TUNING", str(path))
    return path


def record(file, *rows):
    return bench.record_fastest(file, bench.Setup(mesh(data=2), ("data",)), rows, "a machine")


def find(nbytes, dtype="float32", devices=2, platform="cpu"):
    return measured.find_measured(platform, nbytes, dtype, {"data": devices})


def test_the_fastest_is_written_and_found(file):
    assert find(4096) is None
    said = record(
        file,
        *(row("plain", 3.0), row("ring", 2.0), row("chunked", 4.0)),
        *(row("plain", 5.0, 65536), row("ring", 6.0, 65536)),
    )
    assert said == [("float32", 4096, "ring"), ("float32", 65536, "plain")]
    assert (find(4096), find(65536)) == ("ring", "plain")
    entry = read_entries(file)[measured.problem_of("cpu", 4096, "float32", 2, 1).key]
    assert entry == Entry(
        "xla",
        {"algorithm": "ring"},
        {
            "xla(algorithm=plain)": 3e6,
            "xla(algorithm=ring)": 2e6,
            "xla(algorithm=chunked)": 4e6,
        },
        jax.__version__,
        "a machine",
    )


def test_sizes_between_count_as_the_larger_and_others_are_unknown(file):
    record(file, row("plain", 3.0, 16384), row("ring", 2.0, 16384))
    known = {size: find(size) for size in (4096, 4100, 8192, 12000, 16384, 16388, 1 << 20)}
    assert known == {
        **dict.fromkeys([4100, 8192, 12000, 16384], "ring"),
        **dict.fromkeys([4096, 16388, 1 << 20], None),
    }


def test_another_dtype_group_platform_or_run_is_another_class(file, monkeypatch):
    record(file, row("plain", 3.0), row("ring", 2.0))
    assert find(4096, dtype="bfloat16") is None
    assert find(4096, devices=4) is None
    assert find(4096, platform="gpu") is None
    monkeypatch.setattr(measured._compat, "coordination_size", lambda: 2)
    assert find(4096) is None


def test_what_is_wrong_rounds_or_stands_alone_is_not_written(file):
    assert record(file, row("plain", 3.0), row("ring", 2.0, wrong=1)) == []
    assert record(file, row("plain", 3.0), row("bf16_wire", 2.0)) == []
    assert record(file, row("", 3.0), row("ring", 2.0)) == []
    assert read_entries(file) == {}


def test_other_entries_stay(file):
    other = Entry("xla", {}, {"xla": 1.0}, "0.10.2", "another machine")
    write_entries(file, {"another|key": other})
    record(file, row("plain", 3.0), row("ring", 2.0))
    assert read_entries(file)["another|key"] == other
    assert len(read_entries(file)) == 2


def test_gradients_are_exchanged_by_what_was_recorded(file):
    """Read from the compiled program: a ring has no all-reduce."""

    def kinds():
        def average(x):
            return tx.sync_gradients({"w": x}, "data")[0]["w"]

        mapped = jax.shard_map(average, mesh=mesh(data=2), in_specs=P("data"), out_specs=P())
        text = jax.jit(mapped).lower(np.ones(2048, np.float32)).compile().as_text()
        return {kind for kind in ("all-reduce", "collective-permute") if f" {kind}(" in text}

    assert kinds() == {"all-reduce"}
    record(file, row("plain", 3.0), row("ring", 2.0))
    assert kinds() == {"collective-permute"}


def test_what_cannot_run_is_not_taken(file):
    record(file, row("plain", 3.0), row("recursive_doubling", 2.0))
    assert choice.fastest("cpu", 4096, {"data": 2}) == "recursive_doubling"
    record(file, row("plain", 3.0), row("hierarchical", 2.0))
    assert choice.fastest("cpu", 4096, {"data": 2}) == "plain"
    assert choice.fastest("cpu", 4096, {"node": 1, "device": 2}) == "hierarchical"
