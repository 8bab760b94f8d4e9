"""The squared norm against float64 NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from txcore import kernels
from txcore.kernels.optimizer import mosaic, pallas
from txcore.kernels.squared_norm import api

WAYS = {
    "default": {},
    "one sum": {"implementation": "xla", "config": api.Config(1)},
    "pallas": {"implementation": "pallas"},
    "small blocks": {"implementation": "pallas", "config": pallas.Config(32)},
}
if machine.ON_CPU:
    WAYS["mosaic"] = {"implementation": "mosaic_tpu", "config": mosaic.Config(1024)}
EVERY_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def squared_norm(way, **compiler_options):
    function = functools.partial(kernels.squared_norm, **way)
    return jax.jit(function, compiler_options=compiler_options)


def values(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) + 1, dtype)


def truth(x):
    return float((np.asarray(x, np.float64) ** 2).sum())


@EVERY_WAY
@pytest.mark.parametrize("shape", [(), (0,), (7,), (65,), (1023,), (5, 205)])
def test_any_size(shape, way):
    x = values(shape, jnp.float32)
    got = squared_norm(way)(x)
    assert (got.shape, got.dtype, got.weak_type) == ((), jnp.float32, False)
    np.testing.assert_allclose(got, truth(x), rtol=3e-7)


@EVERY_WAY
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_added_up_in_float32(dtype, way):
    x = 300 * values((4097,), dtype)  # a square is infinite in float16
    got = squared_norm(way)(x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, truth(x), rtol=3e-7)


@EVERY_WAY
def test_float64_is_added_up_in_float64(way):
    with jax.enable_x64(True):
        x = values((1025,), "float64")
        np.testing.assert_allclose(squared_norm(way)(x), truth(x), rtol=1e-14)


def test_the_error_does_not_grow_with_the_size():
    x = np.random.default_rng(0).normal(size=10_000_003).astype(np.float32)
    exact = truth(x)
    for options in ({}, kernels.compiler_options("cpu")):
        assert abs(float(squared_norm({}, **options)(x)) / exact - 1) < 4e-7


@EVERY_WAY
def test_what_is_not_finite_is_not_lost(way):
    for bad in (np.nan, np.inf, -np.inf):
        got = squared_norm(way)(jnp.ones(100).at[70].set(bad))
        np.testing.assert_equal(np.asarray(got), np.abs(bad))


@EVERY_WAY
def test_forward_mode_and_a_second_derivative(way):
    x, dx = values((33,), jnp.float32), values((33,), jnp.float32, seed=1)
    function = functools.partial(kernels.squared_norm, **way)
    out, tangent = jax.jit(lambda x, dx: jax.jvp(function, (x,), (dx,)))(x, dx)
    np.testing.assert_allclose(out, truth(x), rtol=3e-7)
    expected = 2 * (np.asarray(x, np.float64) * np.asarray(dx, np.float64)).sum()
    np.testing.assert_allclose(tangent, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.hessian(function))(x), 2 * np.eye(33), atol=1e-6)


@EVERY_WAY
def test_vmap_and_gradient(way):
    x = values((5, 70), jnp.float32)
    got = jax.jit(jax.vmap(lambda row: kernels.squared_norm(row, **way)))(x)
    np.testing.assert_allclose(got, [truth(row) for row in x], rtol=3e-7)
    gradient = jax.jit(jax.grad(lambda x: kernels.squared_norm(x, **way)))(x)
    np.testing.assert_allclose(gradient, 2 * x, rtol=1e-6)


@EVERY_WAY
@pytest.mark.parametrize("checked", [True, False])
def test_each_device_gives_the_norm_of_its_part(checked, way):
    mesh = machine.mesh(data=2)
    x = values((2, 100), jnp.float32)
    mapped = jax.shard_map(
        lambda x: kernels.squared_norm(x, **way)[None],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=checked,
    )
    np.testing.assert_allclose(jax.jit(mapped)(x), [truth(row) for row in x], rtol=3e-7)


def test_integers_are_refused():
    text = (
        "squared_norm: x needs a floating-point dtype, got int32: cast it, for example "
        "x.astype(jnp.float32)"
    )
    with pytest.raises(TypeError, match=re.escape(text)):
        kernels.squared_norm(jnp.arange(3))
