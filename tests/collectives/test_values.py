"""Values that the matrix (test_matrix.py) has no cell for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, sharded, shards

import txcore as tx


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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_acts_on_each_leaf_of_a_pytree(case):
    sizes = {"data": 2}
    tree = {"w": shards(sizes), "b": [shards(sizes, (4, 2), seed=1), None]}
    got = sharded(lambda v: case.call(v, "data"), sizes)(tree)
    wanted = jax.tree.map(lambda v: case.expect(v, sizes, ("data",)), tree)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


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
