"""Means whose sum is beyond the dtype, against NumPy in float64; sums keep the dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import sharded

import txcore as tx
from txcore.profiling import audit

# Four devices' values whose sum no array of their dtype holds, and the dtype of their mean.
BEYOND = {
    "int8": ([100, 101, 102, 104], "float32"),
    "uint8": ([100, 101, 102, 104], "float32"),
    "int16": ([30000, 30001, -5, 32767], "float32"),
    "uint16": ([60000, 60001, 5, 65535], "float32"),
    "int32": ([2**30] * 4, "float32"),
    "uint32": ([2**31] * 4, "float32"),
    "float16": ([40000] * 4, "float16"),
    "float8_e4m3fn": ([256, 320, 384, 448], "float8_e4m3fn"),
    "bool": ([True, True, True, False], "float32"),
}
TINY = ([6e-8, 1.2e-7, 6e-8, 1.8e-7], "float16")  # subnormal: halved, they would be rounded away
WAYS = ["tracked", "untracked", "vmap", "two axes"]
means = pytest.mark.parametrize("op", ["pmean", "reduce_scatter"])


def run(op, x, way):
    """Return every device's mean of x [4, 4], as the whole or as its part of it."""

    def f(v, axis="data"):
        return tx.pmean(v, axis) if op == "pmean" else tx.reduce_scatter(v, axis, mean=True)

    if way == "vmap":
        return jax.vmap(f, axis_name="data")(x)
    if way == "two axes":
        return sharded(lambda v: f(v, ("data", "model")), {"data": 2, "model": 2})(x)
    return sharded(f, {"data": 4}, check_vma=way == "tracked")(x)


def stacked(values, dtype):
    return jnp.asarray(np.repeat(np.asarray(values)[:, None], 4, axis=1)).astype(dtype)


@means
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [*BEYOND, "tiny"])
def test_a_mean_that_can_be_represented_does_not_overflow(dtype, way, op):
    values, mean_dtype = TINY if dtype == "tiny" else BEYOND[dtype]
    x = stacked(values, "float16" if dtype == "tiny" else dtype)
    got = run(op, x, way)
    assert got.dtype == jnp.dtype(mean_dtype)
    right = np.asarray(x, np.float64).mean(0).astype(got.dtype)
    np.testing.assert_array_equal(got.ravel(), np.broadcast_to(right[0], got.size))


@means
def test_64_bits(op):
    with jax.enable_x64(True):
        got = run(op, stacked([2**62] * 4, "int64"), "tracked")
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got.ravel(), np.full(got.size, 2.0**62))


@pytest.mark.parametrize("dtype", BEYOND)
def test_on_one_device_it_is_the_value_itself(dtype):
    x = stacked(BEYOND[dtype][0], dtype)[:1]
    got = sharded(lambda v: tx.pmean(v, "data"), {"data": 1})(x)
    assert got.dtype == jnp.dtype(BEYOND[dtype][1])
    np.testing.assert_array_equal(np.asarray(got, np.float64), np.asarray(x, np.float64))


@means
def test_what_it_sends_is_known_to_the_audit(op):
    sent = {}
    for dtype in ("float16", "bfloat16", "float32", "int8"):
        x = stacked([1, 2, 3, 4], dtype)
        report = audit(lambda v: run(op, v, "tracked"), x)
        [row] = report.collectives
        assert report.exact
        sent[dtype] = row.dtype, row.payload_bytes
    in_float32 = ("float32", 4 * 4)
    assert sent.pop("bfloat16") == ("bfloat16", 2 * 4)
    assert set(sent.values()) == {in_float32}


def test_the_plan_predicts_what_float16_gradients_send():
    mesh = tx.MeshSpec(jax.devices()[:4], axes=("data",))
    [found] = tx.Plan(data_parallel=tx.DP("data")).predict({"w": np.zeros(8, np.float16)}, mesh)
    assert (found.dtype, found.payload_bytes) == ("float32", 32)


def test_the_gradient_of_a_wide_mean_is_a_quarter():
    def f(v):
        return jax.grad(lambda w: tx.pmean(w * v, "data").sum())(tx.vary(jnp.float16(1), "data"))

    x = jnp.full((4, 1), 40000, jnp.float16)
    got = sharded(f, {"data": 4})(x)
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, np.full(4, 10000, np.float16))


@pytest.mark.parametrize(
    "dtype, values, total",
    [("int8", [100, 101, 102, 104], -105), ("float16", [40000] * 4, np.inf), ("bool", [1] * 4, 4)],
)
def test_a_sum_is_taken_in_the_dtype_of_what_is_summed(dtype, values, total):
    x = stacked(values, dtype)
    got = sharded(lambda v: tx.psum(v, "data"), {"data": 4})(x)
    assert got.dtype == ("int32" if dtype == "bool" else dtype)
    np.testing.assert_array_equal(got, np.full((4, 4), total))
