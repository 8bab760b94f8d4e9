"""What the collectives refuse, and in which words."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import sharded, shards

import txcore as tx

X = np.ones((4, 8), np.float32)

BAD = [
    (
        lambda x: tx.psum(tx.psum(x, "data"), "data", name="loss"),
        ValueError,
        "tx.psum over axis 'data': loss does not vary along it: it is reduced already, or the "
        "same on every device. Another reduction would multiply it by 4: remove one. If it is "
        "meant all the same, reduce tx.vary(x, 'data')",
    ),
    (
        lambda x: tx.pmean({"w": {"b": tx.pmean(x, "data")}}, "data", name="grads"),
        ValueError,
        "tx.pmean over axis 'data': grads['w']['b'] does not vary along it: it is reduced already, "
        "or the same on every device. Another reduction would change nothing: remove one",
    ),
    (
        lambda x: tx.reduce_scatter(jnp.ones(8), "data"),
        ValueError,
        "tx.reduce_scatter over axis 'data': x does not vary along it",
    ),
    (
        lambda x: tx.psum(1, "data"),
        TypeError,
        "tx.psum needs arrays, got the Python number 1 at x: it is the same on every device, so "
        "there is nothing to reduce. For the number of devices use tx.axis_size",
    ),
    (
        lambda x: tx.psum(x, "model"),
        NameError,
        "tx.psum needs mesh axis 'model', but the axes bound here are 'data': use one of them",
    ),
    (
        lambda x: tx.all_gather(x, ("data", "data")),
        ValueError,
        "tx.all_gather needs each mesh axis once, got axis=('data', 'data')",
    ),
    (
        lambda x: tx.psum(x, 0),
        TypeError,
        "tx.psum needs axis= a mesh axis name or a non-empty tuple of them, got 0",
    ),
    (
        lambda x: tx.psum(x, ()),
        TypeError,
        "tx.psum needs axis= a mesh axis name or a non-empty tuple of them, got ()",
    ),
    (
        lambda x: tx.psum(x, "data", name="grad,w"),
        ValueError,
        "tx.psum needs name= of letters, digits and _ . / - only (reports join the tags of "
        "merged collectives with commas), got 'grad,w'",
    ),
    (
        lambda x: tx.psum(x, "data", name='a"b'),
        ValueError,
        "tx.psum needs name= of letters, digits and _ . / - only",
    ),
    (
        lambda x: tx.reduce_scatter(x[:6], "data"),
        ValueError,
        "tx.reduce_scatter over 'data' needs dim=0 of x divisible by 4, got shape (6,): pad it",
    ),
    (
        lambda x: tx.all_to_all(x[None, :6], "data", split_dim=1, concat_dim=0),
        ValueError,
        "tx.all_to_all over 'data' needs split_dim=1 of x divisible by 4, got shape (1, 6): pad",
    ),
    (
        lambda x: tx.all_gather({"a": x}, "data", dim=1),
        ValueError,
        "tx.all_gather needs dim= a dim of x['a'], which has shape (8,), got 1",
    ),
    (
        lambda x: tx.all_gather(x.sum(), "data"),
        ValueError,
        "which has shape (), got 0; give a scalar a dim with x[None]",
    ),
    (
        lambda x: tx.psum({"w": x, "name": "conv"}, "data", name="grads"),
        TypeError,
        "tx.psum needs arrays, got str at grads['name']: remove that leaf or convert it with "
        "jnp.asarray",
    ),
    (
        lambda x: tx.psum(jax.random.split(jax.random.key(0), 2), "data"),
        TypeError,
        "tx.psum cannot reduce the PRNG keys at x: pass jax.random.key_data(keys)",
    ),
    (
        lambda x: tx.ppermute(x, "data", [(0, 1), (0, 2)]),
        ValueError,
        "tx.ppermute needs each source once, got 0 more than once in perm=((0, 1), (0, 2)); to "
        "send to several use tx.broadcast",
    ),
    (
        lambda x: tx.ppermute(x, "data", [(0, 1), (2, 1)]),
        ValueError,
        "tx.ppermute needs each destination once, got 1 more than once",
    ),
    (
        lambda x: tx.ppermute(x, "data", [(0, 4)]),
        ValueError,
        "tx.ppermute over 'data' needs indices 0 to 3, got destination 4 in perm=((0, 4),)",
    ),
    (
        lambda x: tx.ppermute(x, "data", [0, 1]),
        TypeError,
        "tx.ppermute needs perm= pairs (source, destination) of ints, got [0, 1]",
    ),
    (
        lambda x: tx.shift(x, "data", by=0.5),
        TypeError,
        "tx.shift needs by= an int, got 0.5",
    ),
    (
        lambda x: tx.broadcast(x, "data", root=4),
        ValueError,
        "tx.broadcast over 'data' needs root= 0 to 3, got 4",
    ),
    (
        lambda x: tx.axis_size("pipe"),
        NameError,
        "tx.axis_size needs mesh axis 'pipe', but the axes bound here are 'data'",
    ),
]


@pytest.mark.parametrize("f,error,text", BAD, ids=[t[:40] for _, _, t in BAD])
def test_is_refused_before_anything_runs(f, error, text):
    with pytest.raises(error, match=re.escape(text)):
        jax.eval_shape(sharded(f, {"data": 4}, jit=False), X)


@pytest.mark.parametrize("op", ["psum", "all_gather", "vary", "axis_index", "pmax"])
def test_outside_shard_map(op):
    args = ("data",) if op == "axis_index" else (X, "data")
    with pytest.raises(
        NameError, match=f"tx.{op} needs mesh axis 'data', but no mesh axis is bound"
    ):
        getattr(tx, op)(*args)


def test_guard_is_off_where_jax_does_not_track():
    """check_vma=False and vmap: every value types as invariant, so nothing can be told."""
    f = sharded(lambda x: tx.psum(tx.psum(x, "data"), "data"), {"data": 4}, check_vma=False)
    np.testing.assert_array_equal(f(X), np.full_like(X, 16))
    g = jax.vmap(lambda x: tx.psum(tx.psum(x, "data"), "data"), axis_name="data")
    np.testing.assert_array_equal(g(X), np.full_like(X, 16))


def test_partly_varying_is_refused_by_the_axis_it_lacks():
    def f(x):
        return tx.psum(tx.psum(x, "model"), ("data", "model"))

    with pytest.raises(ValueError, match="over axis 'model': x does not vary along it"):
        jax.eval_shape(sharded(f, {"data": 2, "model": 2}, jit=False), X)


def test_pmax_of_an_invariant_value_sends_nothing():
    f = sharded(lambda x: tx.pmax(tx.psum(x, "data"), "data"), {"data": 4})
    assert str(jax.make_jaxpr(f)(X)).count("pmax") == 0


@pytest.mark.parametrize("op", ["psum", "pmean", "all_gather", "reduce_scatter"])
def test_axis_of_size_one_returns_an_invariant_value_unchanged(op):
    sizes = {"data": 2, "one": 1}

    def f(x):
        return getattr(tx, op)(tx.psum(x, ("data", "one")), "one")

    text = str(jax.make_jaxpr(sharded(f, sizes))(shards(sizes)))
    assert text.count("psum") == 1
    assert "gather" not in text
    assert "scatter" not in text


def test_permute_on_an_axis_of_size_one_keeps_its_meaning():
    sizes = {"data": 2, "one": 1}
    x = shards(sizes)
    kept = sharded(lambda v: tx.shift(v, "one"), sizes)(x)
    np.testing.assert_array_equal(kept, x)
    nobody = sharded(lambda v: tx.shift(v, "one", wrap=False), sizes)(x)
    np.testing.assert_array_equal(nobody, np.zeros_like(x))
    assert "ppermute" not in str(jax.make_jaxpr(sharded(lambda v: tx.shift(v, "one"), sizes))(x))


def test_vary_is_idempotent_axis_by_axis():
    def f(x):
        x = tx.psum(x, ("data", "model"))
        x = tx.vary(x, "data")
        x = tx.vary(x, ("data", "model"))
        return tx.vary(x, "model")

    x = shards({"data": 2, "model": 2})
    got = sharded(f, {"data": 2, "model": 2})(x)
    np.testing.assert_array_equal(got, np.broadcast_to(x.sum(0), x.shape))


@pytest.mark.parametrize("op", ["psum", "pmax", "broadcast", "all_gather", "shift"])
def test_an_axis_of_vmap_inside_shard_map(op):
    """jax types vmapped data as invariant there: nothing could be told, so it is refused."""

    def f(x):
        return jax.vmap(lambda v: getattr(tx, op)(v, "rows"), axis_name="rows")(x)

    x = shards({"data": 2}, (4, 4))
    text = f"tx.{op} over 'rows', an axis of jax.vmap, inside a shard_map or step over 'data'"
    with pytest.raises(ValueError, match=re.escape(text)):
        jax.eval_shape(sharded(f, {"data": 2}, jit=False), x)
    if op in ("psum", "pmax"):
        reduce = {"psum": np.sum, "pmax": np.max}[op]
        got = sharded(f, {"data": 2}, check_vma=False)(x)
        np.testing.assert_array_equal(got, np.broadcast_to(reduce(x, 1, keepdims=True), x.shape))
