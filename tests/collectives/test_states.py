"""jax's four states along an axis: varying, invariant, reduced and unreduced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import sharded, shards
from jax import lax

import txcore as tx
from txcore import _compat
from txcore.profiling import audit

ONE, TWO = {"data": 4}, {"data": 2, "model": 2}
BOTH = ("data", "model")
X = shards(ONE)


def parts(x, axes="data"):
    return lax.pcast(x, axes, to="unreduced")


def equal(x, axes="data"):
    """Return `x`, equal on all devices, typed so that its cotangent is unreduced."""
    return lax.pcast(x, axes, to="reduced")


REDUCTIONS = {
    "psum": (lambda x, axis: tx.psum(x, axis), lambda x: x.sum(0)),
    "pmean": (lambda x, axis: tx.pmean(x, axis), lambda x: x.mean(0)),
    "reduce_scatter": (lambda x, axis: tx.reduce_scatter(x, axis), lambda x: x.sum(0)),
    "mean of parts": (lambda x, axis: tx.reduce_scatter(x, axis, mean=True), lambda x: x.mean(0)),
}


@pytest.mark.parametrize("unreduced", ["data", "model", BOTH], ids=str)
@pytest.mark.parametrize("op", REDUCTIONS)
def test_the_sum_that_an_unreduced_value_waits_for(op, unreduced):
    """Over both axes it is one collective, whichever of them it is unreduced along."""
    reduce, expect = REDUCTIONS[op]
    f = sharded(lambda x: reduce(parts(x, unreduced), BOTH), TWO)
    got = np.asarray(f(X))
    wanted = expect(X)
    whole = got.reshape(-1, *got.shape[2:]) if "scatter" in op or "parts" in op else got[2]
    np.testing.assert_allclose(whole, wanted, rtol=1e-6)
    report = audit(f, X)
    assert report.exact
    assert [row.axes for row in report.collectives] == [BOTH]


@pytest.mark.parametrize("op", ["psum", "pmean"])
def test_one_axis_after_the_other(op):
    reduce, expect = REDUCTIONS[op]
    got = sharded(lambda x: reduce(reduce(parts(x, "data"), "data"), "model"), TWO)(X)
    np.testing.assert_allclose(got[0], expect(X), rtol=1e-6)


def test_an_unreduced_value_on_an_axis_of_one_device():
    got = sharded(lambda x: tx.psum(parts(x), "data"), {"data": 1})(X[:1])
    np.testing.assert_array_equal(got, X[:1])
    got = sharded(lambda x: tx.reduce_scatter(parts(x), "data"), {"data": 1})(X[:1])
    np.testing.assert_array_equal(got, X[:1])


def test_float16_parts_are_averaged_as_widely_as_other_values():
    x = np.full((4, 2), 40000, np.float16)
    np.testing.assert_array_equal(sharded(lambda v: tx.pmean(parts(v), "data"), ONE)(x), x)


def test_the_transpose_of_a_sum_of_parts_is_a_cast():
    """The cotangent of an unreduced value is reduced: equal everywhere, and nothing is sent."""

    def f(x):
        return jax.grad(lambda v: (tx.psum(parts(v), "data") * jnp.arange(8.0)).sum())(x)

    f = sharded(f, ONE)
    np.testing.assert_array_equal(f(X), np.broadcast_to(np.arange(8.0), X.shape))
    assert audit(f, X).collectives == ()


def gradient(x, reduce):
    """The gradient of sum(w * x) by reduced weights: unreduced, until `reduce`."""
    w = equal(jnp.full(8, 2.0))
    local = jax.grad(lambda w: (tx.vary(w, "data") * x).sum())(w)
    assert _compat.unreduced_axes(local) == {"data"}
    return reduce(local, "data")


@pytest.mark.parametrize("op", ["psum", "pmean"])
def test_gradients_of_reduced_weights_are_reduced_once(op):
    reduce, expect = REDUCTIONS[op]
    f = sharded(lambda x: gradient(x, reduce), ONE)
    np.testing.assert_allclose(f(X)[0], expect(X.sum(1)), rtol=1e-6)
    [row] = audit(f, X).collectives
    assert (row.kind, row.origin, row.tags) == ("all-reduce", "txcore", (op,))


def test_value_and_grad_of_reduced_weights_is_local():
    def f(x):
        _, grads = tx.value_and_grad(lambda w: (w * x).sum(), axis="data")(equal(jnp.full(8, 2.0)))
        assert _compat.varying_axes(grads) == {"data"}
        return tx.pmean(grads, "data")

    np.testing.assert_allclose(sharded(f, ONE)(X)[0], X.sum(1).mean(0), rtol=1e-6)


def test_the_documented_accumulation_by_hand():
    """Gradients of microbatches stay unreduced over a scan, and are reduced once after it."""

    def f(x):
        w = equal(jnp.full(8, 2.0))

        def microbatch(total, row):
            return total + jax.grad(lambda w: (tx.vary(w, "data") * row).sum())(w), None

        zeros = parts(tx.vary(jnp.zeros(8), "data"))
        return tx.psum(lax.scan(microbatch, zeros, x)[0], "data", name="grads")

    f = sharded(f, ONE)
    np.testing.assert_allclose(f(X)[0], X.sum((0, 1)), rtol=1e-6)
    report = audit(f, X)
    assert report.exact
    assert [(row.trips, row.tags) for row in report.collectives] == [(1, ("psum/grads",))]


MOVES = {
    "all_gather": lambda x: tx.all_gather(x, "data"),
    "invariant": lambda x: tx.all_gather(x, "data", invariant=True),
    "all_to_all": lambda x: tx.all_to_all(x, "data", split_dim=0, concat_dim=0),
    "ppermute": lambda x: tx.ppermute(x, "data", [(0, 1)]),
    "shift": lambda x: tx.shift(x, "data"),
    "vary": lambda x: tx.vary(x, "data"),
    "broadcast": lambda x: tx.broadcast(x, "data", root=1),
    "pmax": lambda x: tx.pmax(x, "data"),
    "pmin": lambda x: tx.pmin(x, "data"),
}


@pytest.mark.parametrize("op", MOVES)
def test_parts_are_neither_moved_nor_compared(op):
    name = "all_gather" if op == "invariant" else op
    with pytest.raises(ValueError) as caught:
        sharded(lambda x: MOVES[op](parts(x)), ONE)(X)
    assert str(caught.value) == (
        f"tx.{name} over axis 'data': x is unreduced along it, so that each device holds one part "
        "of the sum that it stands for: reduce it first, by tx.psum(x, 'data')"
    )


@pytest.mark.parametrize("op", MOVES)
def test_a_reduced_value_is_the_same_on_every_device(op):
    w = np.arange(8, dtype=np.float32)

    def f(x):
        y = MOVES[op](equal(jnp.arange(8.0)))
        return x[0, 0] * 0 + (y if op in ("invariant",) else tx.vary(y, "data"))

    got = sharded(f, ONE)(X)
    right = np.asarray(sharded(lambda x: MOVES[op](x), ONE)(np.tile(w, (4, 1))))
    np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reducing_a_reduced_value_is_refused(op):
    with pytest.raises(ValueError, match="does not vary along it: it is reduced already"):
        sharded(lambda x: x + REDUCTIONS[op][0](equal(jnp.ones(8)), "data"), ONE)(X)
