"""Every collective against NumPy: values, dtypes, pytrees, and inside jax's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, MESHES, as_tuple, sharded, shards

import txcore as tx

both = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
cases = pytest.mark.parametrize("case", CASES, ids=str)
meshes = pytest.mark.parametrize("sizes,axis", MESHES, ids=str)


@both
@meshes
@cases
def test_equals_numpy(case, sizes, axis, check_vma):
    x = shards(sizes)
    got = sharded(lambda v: case.call(v, axis), sizes, check_vma=check_vma)(x)
    np.testing.assert_array_equal(got, case.expect(x, sizes, as_tuple(axis)))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "int32"])
@cases
def test_keeps_the_dtype(case, dtype):
    sizes = {"data": 4}
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(shards(sizes), dtype)
        got = sharded(lambda v: case.call(v, "data"), sizes)(x)
        averages = case.op == "pmean" or case.kwargs.get("mean")
        assert got.dtype == (jnp.float32 if dtype == "int32" and averages else jnp.dtype(dtype))
        wanted = case.expect(np.asarray(x, np.float64), sizes, ("data",))
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=2**-7)


def test_bool_is_counted_by_psum_and_kept_by_broadcast():
    x = shards({"data": 4}) > 0
    summed = sharded(lambda v: tx.psum(v, "data"), {"data": 4})(x)
    np.testing.assert_array_equal(summed, np.broadcast_to(x.sum(0), x.shape))
    for n in (1, 4):
        parts = sharded(lambda v: tx.reduce_scatter(v, "data", mean=True), {"data": n})(x[:n])
        assert parts.dtype == np.float32
        np.testing.assert_array_equal(np.concatenate(parts), x[:n].mean(0))
    sent = sharded(lambda v: tx.broadcast(v, "data", root=3), {"data": 4})(x)
    assert sent.dtype == bool
    np.testing.assert_array_equal(sent, np.broadcast_to(x[3], x.shape))


@cases
def test_acts_on_each_leaf_of_a_pytree(case):
    sizes = {"data": 2}
    tree = {"w": shards(sizes), "b": [shards(sizes, (4, 2), seed=1), None]}
    got = sharded(lambda v: case.call(v, "data"), sizes)(tree)
    wanted = jax.tree.map(lambda v: case.expect(v, sizes, ("data",)), tree)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("how", ["scan", "vmap", "remat", "custom_vjp", "nested_jit"])
@both
@cases
def test_inside_transformations(case, how, check_vma):
    sizes = {"data": 2}
    x = shards(sizes, (3, *(4, 4)))

    def op(v):
        return case.call(v, "data")

    def custom(v):
        f = jax.custom_vjp(op)
        f.defvjp(lambda v: (op(v), None), lambda _, g: (g,))
        return f(v)

    ways = {
        "scan": lambda v: jax.lax.scan(lambda c, row: (c, op(row)), 0, v)[1],
        "vmap": jax.vmap(op),
        "remat": lambda v: jnp.stack([jax.checkpoint(op)(row) for row in v]),
        "custom_vjp": lambda v: jnp.stack([custom(row) for row in v]),
        "nested_jit": lambda v: jnp.stack([jax.jit(op)(row) for row in v]),
    }
    got = sharded(ways[how], sizes, check_vma=check_vma)(x)
    rows = [case.expect(x[:, i], sizes, ("data",)) for i in range(3)]
    np.testing.assert_array_equal(got, np.stack(rows, axis=1))


@pytest.mark.parametrize("case", [c for c in CASES if "vary" not in c.op], ids=str)
def test_over_an_axis_of_vmap(case):
    x = shards({"data": 4})
    got = jax.vmap(lambda v: case.call(v, "data"), axis_name="data")(x)
    np.testing.assert_array_equal(got, case.expect(x, {"data": 4}, ("data",)))


def test_nan_on_other_devices_does_not_spread():
    x = shards({"data": 4})
    x[1:] = np.nan
    got = sharded(lambda v: tx.broadcast(v, "data"), {"data": 4})(x)
    np.testing.assert_array_equal(got, np.broadcast_to(x[0], x.shape))


def test_axis_index_and_axis_size():
    sizes = {"data": 2, "model": 4}

    def f(x):
        where = [tx.axis_index("data"), tx.axis_index("model"), tx.axis_index(("model", "data"))]
        assert tx.axis_size("model") == 4
        assert tx.axis_size(("data", "model")) == 8
        return x + jnp.stack(where)

    got = sharded(f, sizes)(np.zeros((8, 3), np.int32))
    np.testing.assert_array_equal(got, [[i // 4, i % 4, i % 4 * 2 + i // 4] for i in range(8)])
