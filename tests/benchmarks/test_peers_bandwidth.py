"""The comparison of all-reduces: its rounds and its table, and jax's ranks of it for real."""

import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks" / "peers"))

import bandwidth
import pool
from bandwidth import Group, Measured

CORE = min(os.sched_getaffinity(0))


def test_a_row_has_the_best_of_ours_and_ratios_within_rounds():
    def turns(*seconds):
        return [Measured(x, 2 * x) for x in seconds]

    found = {
        "torch gloo": turns(4.0, 8.0, 6.0),
        "lax.psum": turns(9.0, 3.0, 9.0),
        "lax.psum, operand donated": turns(1.0, 1.0, 1.0),
        "txcore ring": turns(2.0, 2.0, 3.0),
        "txcore plain": turns(5.0, 5.0, 5.0),
    }
    row = bandwidth.row_of(4 << 30, found)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:7] == ["4096 MiB", "0.716", "0.477", "2.15", "ring", "2.00", "3.00"]
    assert cells[7:] == ["1.2e+04", "1.8e+04", "4e+03"]
    assert len(cells) == len(bandwidth.HEADER)
    del found["torch gloo"]
    cells = [cell.strip() for cell in bandwidth.row_of(8192, found).strip("|").split("|")]
    assert (cells[0], cells[1], cells[5]) == ("8 KiB", "-", "-")


def test_groups_are_read():
    assert bandwidth.parse(["--groups", "2x1,1x4"]).groups == [Group(2, 1), Group(1, 4)]
    assert [str(group) for group in bandwidth.GROUPS] == [
        *("2 processes", "4 processes", "2 devices in one process")
    ]


@pytest.mark.parametrize("processes, devices", [(2, 1), (1, 2)])
def test_ranks_of_jax_answer(processes, devices):
    group = Group(processes, devices)
    for library, form in (("plain", "psum"), ("txcore", "ring")):
        workers = bandwidth.Workers(
            sys.executable, bandwidth.JAX, group, [CORE] * processes, library
        )
        try:
            assert set(workers.versions) == {"jax"}
            turn = workers.run(form, 4096, 3)
            assert 0 < turn.seconds < 10
            assert 0 < turn.cpu_seconds < 10
        finally:
            workers.close()


def test_a_rank_that_ends_is_reported_with_its_words(monkeypatch, tmp_path):
    workers = bandwidth.Workers(sys.executable, bandwidth.JAX, Group(1, 2), [CORE], "txcore")
    try:
        with pytest.raises(pool.PeerError, match="rank 0 ended; its output ends with:") as caught:
            workers.run("tree", 4096, 3)
        assert "KeyError: 'tree'" in str(caught.value)
    finally:
        workers.close()
