"""Collectives are measured as nccl-tests does, and wrong ones are counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from machine import mesh

import txcore as tx
from txcore import bench
from txcore.bench import check, measure

SIZE = 4096


def setup(axes=("data",), **sizes):
    return bench.Setup(mesh(**(sizes or {"data": 2})), axes, warmup=1, iterations=2)


def row_of(operation, where, dtype="float32", size=SIZE):
    return bench.measure_size(where, operation, dtype, size)


GROUPS = {
    "3 devices": ({"data": 3}, ("data",)),
    "two groups, interleaved": ({"data": 2, "model": 2}, ("data",)),
    "two axes, the inner one first": ({"data": 2, "model": 2, "pipe": 2}, ("pipe", "data")),
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", bench.OPERATIONS)
def test_a_right_collective_has_nothing_wrong(name, groups):
    sizes, axes = GROUPS[groups]
    where = setup(axes, **sizes)
    row = row_of(bench.OPERATIONS[name], where)
    assert row.wrong == 0
    assert row.rank_seconds == (row.seconds,) == (row.least_seconds,)
    # Rounded down to a part for each device where nccl-tests does.
    parts = name in ("all_gather", "reduce_scatter", "all_to_all")
    n = where.group_size
    assert row.size_bytes == (SIZE // 4 // n * n * 4 if parts else SIZE)
    assert row.count == (SIZE // 4 // n if parts else SIZE // 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "uint8", "int32"])
@pytest.mark.parametrize("name", ["psum", "ppermute"])
def test_every_dtype(name, dtype):
    row = row_of(bench.OPERATIONS[name], setup(), dtype)
    assert (row.wrong, row.dtype, row.size_bytes) == (0, dtype, SIZE)


def test_integers_wrap_around_as_numpys_do(monkeypatch):
    monkeypatch.setattr(check, "_TOP", 120)
    assert row_of(bench.OPERATIONS["psum"], setup(data=4), "int8").wrong == 0


# What each does wrong, and how many of its 1024 elements a check of one device finds.
def one_element(x, axes):
    return tx.psum(x, axes).at[7].add(1)


def one_nan(x, axes):
    return tx.psum(x, axes).at[1023].set(jnp.nan)


def on_one_device(x, axes):
    return tx.vary(tx.psum(x, axes), axes).at[7].add(tx.axis_index(axes) == 1)


def an_element_short(x, axes):
    return tx.psum(x, axes)[:-1]


def one_place_on(x, axes):
    return jnp.roll(tx.psum(x, axes), 1)


def not_at_all(x, axes):
    return x


PLANTED = {one_element: 2, one_nan: 2, on_one_device: 1, an_element_short: 2}


@pytest.mark.parametrize("run", PLANTED, ids=lambda run: run.__name__)
def test_a_wrong_collective_is_counted_before_and_after_the_timed_calls(run):
    operation = dataclasses.replace(bench.OPERATIONS["psum"], run=run)
    assert row_of(operation, setup()).wrong == 2 * PLANTED[run]


@pytest.mark.parametrize("run", [one_place_on, not_at_all], ids=lambda run: run.__name__)
def test_most_elements_of_a_collective_that_does_something_else_are_wrong(run):
    operation = dataclasses.replace(bench.OPERATIONS["psum"], run=run)
    assert SIZE >= row_of(operation, setup()).wrong > SIZE // 2


OTHERS = {
    "psum": lambda x, axes: tx.pmax(x, axes),
    "pmean": lambda x, axes: tx.psum(x, axes),
    "pmax": lambda x, axes: tx.pmin(x, axes),
    "all_gather": lambda x, axes: tx.all_gather(tx.shift(x, axes), axes),
    "reduce_scatter": lambda x, axes: tx.shift(tx.reduce_scatter(x, axes), axes),
    "all_to_all": lambda x, axes: x,
    "ppermute": lambda x, axes: tx.shift(x, axes, -1),
    "broadcast": lambda x, axes: tx.broadcast(x, axes, root=1),
}


@pytest.mark.parametrize("name", bench.OPERATIONS)
def test_another_collective_is_not_taken_for_it(name):
    operation = dataclasses.replace(bench.OPERATIONS[name], run=OTHERS[name])
    assert row_of(operation, setup(data=4)).wrong > SIZE // 16


def test_the_other_axis_is_not_taken_for_it():
    where = setup(("data",), data=2, model=2)
    operation = dataclasses.replace(
        bench.OPERATIONS["psum"], run=lambda x, axes: tx.psum(x, "model")
    )
    assert row_of(operation, where).wrong > SIZE


def test_a_bus_that_is_as_busy_whatever_the_group():
    """The factors of nccl-tests' PERFORMANCE.md, by hand for 4 devices."""
    bandwidths = {}
    for name, operation in bench.OPERATIONS.items():
        row = measure._make_row(operation, "float32", 1 << 20, 4, np.array([[1.0, 1, 1]]), 0)
        bandwidths[name] = row.bus_bandwidth / row.algorithm_bandwidth
    assert bandwidths == {
        **dict.fromkeys(["psum", "pmean", "pmax"], 1.5),
        **dict.fromkeys(["all_gather", "reduce_scatter", "all_to_all"], 0.75),
        **dict.fromkeys(["ppermute", "broadcast"], 1.0),
    }


def test_a_row_of_three_ranks():
    quartiles = np.array([[2.0, 1.5, 2.5], [4.0, 4.0, 4.0], [3.0, 1.0, 4.0]])
    row = measure._make_row(bench.OPERATIONS["psum"], "float32", 300, 3, quartiles, 5)
    assert (row.seconds, row.least_seconds, row.spread, row.wrong) == (3.0, 2.0, 1.0, 5)
    assert row.rank_seconds == (2.0, 4.0, 3.0)
    assert (row.algorithm_bandwidth, row.bus_bandwidth) == (400.0, pytest.approx(1600 / 3))


def test_warm_up_calls_do_not_count(monkeypatch):
    clock = iter(np.arange(100.0) ** 2)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    where = dataclasses.replace(setup(), warmup=2, iterations=3)
    # A call takes 1, 5, 9, 13, 17 seconds.
    assert row_of(bench.OPERATIONS["psum"], where).seconds == 13.0


@pytest.mark.parametrize("in_place", [True, False])
def test_the_operand_is_donated_where_its_place_serves(in_place):
    where = dataclasses.replace(setup(), in_place=in_place)
    for name, elements in {"ppermute": 64, "all_gather": 64}.items():
        compiled = measure.compile_operation(where, bench.OPERATIONS[name], "float32", elements)
        operand = measure._make_operand(where, elements, "float32", None)
        jax.block_until_ready(compiled(operand))
        assert operand.is_deleted() == (in_place and name == "ppermute")


def test_a_size_without_an_element_for_each_device_is_refused():
    text = r"all_gather needs a size of at least 8 bytes \(float32 over 2 devices\), got 7: raise"
    with pytest.raises(ValueError, match=text):
        row_of(bench.OPERATIONS["all_gather"], setup(), size=7)
    assert row_of(bench.OPERATIONS["all_gather"], setup(), size=15).size_bytes == 8


def test_pieces_of_an_operand_fit_together():
    draw = check.draw_operand(3)
    whole = draw(5, 0, 3 * check._PERIOD)
    assert set(whole) == set(range(check._TOP))
    np.testing.assert_array_equal(whole[: check._PERIOD], whole[check._PERIOD :][: check._PERIOD])
    for start, stop in ((0, 10), (check._PERIOD - 3, check._PERIOD + 3), (9000, 17000)):
        np.testing.assert_array_equal(draw(5, start, stop), whole[start:stop])
    assert (draw(4, 0, 1000) != whole[:1000]).mean() > 0.5


def test_a_long_result_is_compared_in_pieces(monkeypatch):
    monkeypatch.setattr(check, "_PIECE", 100)
    draw = check.draw_operand(0)
    segments = [bench.operations.Segment((0, 1), 50, 250), bench.operations.Segment((1,), 7, 130)]
    total = (draw(4, 50, 300) + draw(2, 50, 300)).astype(np.float32)
    result = np.concatenate([total, draw(2, 7, 137).astype(np.float32)])
    assert check.count_wrong(result, segments, (4, 2), draw, epsilon=0) == 0
    for at in (0, 99, 100, 249, 250, 379):
        wrong = result.copy()
        wrong[at] += 1
        assert check.count_wrong(wrong, segments, (4, 2), draw, epsilon=0) == 1
    assert check.count_wrong(result[:370], segments, (4, 2), draw, epsilon=0) == 10
    assert check.count_wrong(np.append(result, 0), segments, (4, 2), draw, epsilon=0) == 1
