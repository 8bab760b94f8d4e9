"""Calls in the spelling of jax.lax, and in none: the error has the call to write instead."""

import inspect
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cases import sharded, shards

import txcore

tx: Any = txcore  # most calls here are wrong on purpose, and type checkers say so

# What was called, the call that the error tells to write, and whether that call has its result.
LAX = [
    (lambda x: tx.psum(x, axis_name="data"), "tx.psum(x, 'data')"),
    (lambda x: tx.pmean(x, axis_name=("data",)), "tx.pmean(x, ('data',))"),
    (lambda x: tx.pmax(x, axis_name="data"), "tx.pmax(x, 'data')"),
    (lambda x: tx.pmin(x=x, axis_name="data"), "tx.pmin(x, 'data')"),
    (lambda x: tx.all_gather(x, "data", axis=0, tiled=True), "tx.all_gather(x, 'data')"),
    (lambda x: tx.all_gather(x, "data", axis=1, tiled=True), "tx.all_gather(x, 'data', dim=1)"),
    (
        lambda x: tx.all_gather(x, axis_name="data", axis=1, tiled=True),
        "tx.all_gather(x, 'data', dim=1)",
    ),
    (
        lambda x: tx.all_gather(x, "data", axis=1, tiled=True, to="invarying"),
        "tx.all_gather(x, 'data', dim=1, invariant=True)",
    ),
    (lambda x: tx.all_gather(x, "data", 1), "tx.all_gather(x, 'data', dim=1)"),
    (
        lambda x: tx.reduce_scatter(x, "data", scatter_dimension=1, tiled=True),
        "tx.reduce_scatter(x, 'data', dim=1)",
    ),
    (
        lambda x: tx.psum_scatter(x, axis_name="data", scatter_dimension=1, tiled=True),
        "tx.reduce_scatter(x, 'data', dim=1)",
    ),
    (
        lambda x: tx.all_to_all(x, "data", 0, 1, tiled=True),
        "tx.all_to_all(x, 'data', split_dim=0, concat_dim=1)",
    ),
    (
        lambda x: tx.all_to_all(x, "data", split_axis=1, concat_axis=0, tiled=True),
        "tx.all_to_all(x, 'data', split_dim=1, concat_dim=0)",
    ),
    (
        lambda x: tx.ppermute(x, axis_name="data", perm=[(0, 1)]),
        "tx.ppermute(x, 'data', perm=[(0, 1)])",
    ),
    (lambda x: tx.broadcast(x, axis_name="data", source=2), "tx.broadcast(x, 'data', root=2)"),
    (lambda x: tx.vary(x, axis_name="data"), "tx.vary(x, 'data')"),
    (lambda x: tx.vary(x, "data", to="varying"), "tx.vary(x, 'data')"),
    (lambda x: tx.psum("data", x), "tx.psum(x, 'data')"),
    (lambda x: x + tx.axis_index(axis_name="data"), "tx.axis_index('data')"),
    (lambda x: x + tx.axis_size(axis_name="data"), "tx.axis_size('data')"),
]


def error_of(call):
    with pytest.raises(TypeError) as caught:
        sharded(call, {"data": 4})(shards({"data": 4}))
    return str(caught.value)


@pytest.mark.parametrize("call, written", LAX, ids=[written for _, written in LAX])
def test_the_error_has_the_call_to_write(call, written):
    text = error_of(call)
    assert f": write {written}" in text
    # and that call is one
    got = sharded(lambda x: x * 0 + jnp.sum(eval(written)), {"data": 4})(shards({"data": 4}))
    assert got.shape == (4, 8, 8)


def test_the_error_says_what_was_required_and_given():
    assert error_of(lambda x: tx.all_gather(x, axis_name="data", axis=1, tiled=True)) == (
        "tx.all_gather takes (x, axis, dim=, invariant=, algorithm=, name=), got tx.all_gather(x, "
        "axis_name='data', axis=1, tiled=True) (got an unexpected keyword argument 'axis_name'): "
        "write tx.all_gather(x, 'data', dim=1)"
    )


@pytest.mark.parametrize(
    "call, note",
    [
        (
            lambda x: tx.all_gather(x, axis_name="data"),
            "it concatenates, as jax.lax does with tiled=True; to stack, jnp.expand_dims x",
        ),
        (lambda x: tx.psum_scatter(x, "data", tiled=False), "jnp.squeeze the result's dim"),
        (
            lambda x: tx.psum(x, "data", axis_index_groups=[[0, 1], [2, 3]]),
            "groups of devices are mesh axes: split that axis of the mesh in two",
        ),
        (lambda x: tx.vary(x, "data", to="reduced"), "for to='reduced' use jax.lax"),
        (lambda x: tx.all_to_all(x, "data"), "write tx.all_to_all(x, 'data', split_dim=..., con"),
        (lambda x: tx.psum(x), "missing a required argument: 'axis'): write tx.psum(x, axis)"),
        (lambda x: tx.all_gather(x, axis=0), "write tx.all_gather(x, axis)"),
        (lambda x: tx.psum(x, "data", nme="loss"), "unexpected keyword argument 'nme'"),
    ],
)
def test_what_has_no_literal_replacement_is_explained(call, note):
    assert note in error_of(call)


@pytest.mark.parametrize(
    "op", ["psum", "all_gather", "reduce_scatter", "all_to_all", "ppermute", "broadcast", "vary"]
)
def test_signatures_stay_their_own(op):
    parameters = inspect.signature(getattr(tx, op)).parameters
    assert list(parameters)[:2] == ["x", "axis"]
    assert "name" in parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert getattr(tx, op).__doc__


def test_an_error_of_the_collective_itself_is_not_taken_for_a_wrong_call():
    said = error_of(lambda x: tx.psum("x", "data"))
    assert said.startswith("tx.psum takes (x, axis, algorithm=, name=)")
    assert error_of(lambda x: tx.psum({"a": "x"}, "data")).startswith("tx.psum needs arrays")
    assert "got 3.5" in error_of(lambda x: tx.psum(x, 3.5))


def test_a_right_call_by_keywords():
    x = shards({"data": 4})
    got = sharded(lambda v: tx.all_gather(x=v, axis="data", dim=1), {"data": 4})(x)
    np.testing.assert_array_equal(got[0], np.concatenate(list(x), axis=1))
