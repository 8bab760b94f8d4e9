"""Baselines of programs that leave their sharding to the compiler: no more than was locked."""

import pathlib

import jax
import pytest
from audit_cases import P, mesh_of, shape

from txcore.profiling import (
    AutoShardingError,
    assert_no_auto_sharding,
    audit,
    lock,
    no_auto_collectives,
)

FILE = pathlib.Path("auto.lock.json")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def centers(times=1, width=16):
    def center(x):
        for _ in range(times):
            x = (x - x.mean(0)) ** 2
        return x

    return jax.jit(center), shape(mesh_of(data=8), P("data"), 64, width)


def test_what_nobody_asked_for_is_locked_where_it_is_allowed():
    report = audit(*centers())
    assert not lock.update(FILE, report).ok
    assert lock.update(FILE, report, allow={"partitioner"}).ok
    (entry,) = lock.lock_of(report.allowing({"partitioner"})).entries
    assert (entry.origin, entry.source, entry.payload_bytes) == (
        "partitioner",
        __name__ + ".py",
        64,
    )
    assert lock.check(FILE, report).ok
    assert lock.update(FILE, report).ok, "later updates keep what is allowed"


@pytest.mark.parametrize("more", [{"times": 2}, {"width": 32}])
def test_more_of_it_is_refused(more):
    lock.update(FILE, audit(*centers()), allow={"partitioner"})
    outcome = lock.check(FILE, audit(*centers(**more)))
    assert not outcome.ok
    assert "1 of 1 changed entries grew" in outcome.text


def test_other_origins_and_updates_without_it_are_refused():
    lock.update(FILE, audit(*centers()), allow={"boundary", "partitioner"})
    assert '"allow": ["boundary", "partitioner"]' in FILE.read_text()
    assert not lock.update(FILE, audit(*centers()), allow=()).ok
    assert not lock.update("other.json", audit(*centers()), allow={"boundary"}).ok
    with pytest.raises(ValueError, match="allow needs origins that are refused, of part"):
        lock.update(FILE, audit(*centers()), allow={"user"})


def test_the_assertion_lets_through_what_it_is_told_to():
    report = assert_no_auto_sharding(*centers(), allow={"partitioner"})
    assert (report.status, report.exact, len(report.let_through)) == ("not proved", False, 1)
    assert report.verdict() == (
        "not proved: 1 collective, 64 B payload a call, 0 declared (none), 1 let through "
        "(1 partitioner); nothing else was added"
    )
    with pytest.raises(AutoShardingError):
        assert_no_auto_sharding(*centers(), allow={"boundary"})
    with pytest.raises(TypeError, match="write allow="):
        assert_no_auto_sharding(*centers(), allow="partitioner")


def arrays():
    fn, x = centers()
    return fn, jax.device_put(jax.numpy.ones(x.shape), x.sharding)


def use_all_ways(fn, x, warned):
    with no_auto_collectives(mode="warn"):
        fn(x)
        fn(x)
        with no_auto_collectives(mode="warn", allow={"partitioner"}):
            jax.jit(lambda x: x.sum())(x)
        jax.device_put(x, jax.sharding.NamedSharding(mesh_of(data=8), P()))
        assert not warned.list


def test_a_gate_that_warns_says_all_once_at_its_end():
    fn, x = arrays()
    with pytest.warns(UserWarning, match="communicates unasked") as warned:
        use_all_ways(fn, x, warned)
    (one,) = warned.list
    assert one.filename == __file__
    text = str(one.message)
    assert text.count(" adds 1:") == 3
    assert "compiling jit(center), called at " in text
    assert "allow={'partitioner', 'reshard'}" in text


def refuse_inside(fn, x):
    with no_auto_collectives(mode="warn"), pytest.raises(AutoShardingError), no_auto_collectives():
        fn(x)


def test_a_gate_that_warns_of_nothing_is_silent_and_one_inside_still_refuses():
    fn, x = arrays()
    with no_auto_collectives(mode="warn"):
        jax.jit(lambda x: 2 * x)(x)
    with pytest.warns(UserWarning, match="communicates unasked"):
        refuse_inside(fn, x)
    with pytest.raises(ValueError, match="needs to be one of 'raise', 'warn', but got 'log'"):
        no_auto_collectives(mode="log")
