"""The updates of one array against float64 NumPy and optax."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import kernel_oracles as oracles
import machine
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from txcore import kernels
from txcore.kernels.common import jax_triton_calls
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.optimizer.api import SGD_MOMENTUM

SHAPE = (33, 7)
SGD_OPTIONS = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
]
ADAM = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
ADAM_OPTIONS = [ADAM, {**ADAM, "b1": 0.0, "b2": 0.0}, {**ADAM, "weight_decay": 0.0, "eps": 0.1}]


BOTH = pytest.mark.parametrize(
    "implementation", ["xla", "pallas", "mosaic_tpu"] if machine.ON_CPU else ["xla", "pallas"]
)
UPDATES = {
    "sgd": (
        partial(kernels.sgd_momentum, learning_rate=0.1, momentum=0.9, nesterov=True),
        partial(oracles.sgd_momentum, learning_rate=0.1, momentum=0.9, nesterov=True),
        3,
    ),
    "adamw": (partial(kernels.adamw, step=5, **ADAM), partial(oracles.adamw, step=5, **ADAM), 4),
}
EVERY_UPDATE = pytest.mark.parametrize("update, oracle, count", UPDATES.values(), ids=UPDATES)


def arrays(count, dtype=jnp.float32, seed=0, shape=SHAPE):
    random = np.random.default_rng(seed)
    made = [random.normal(size=shape) for _ in range(count)]
    made[-1] = np.abs(made[-1])  # AdamW's second moment
    return [jnp.asarray(a, dtype) for a in made]


def check(got, truth, dtypes, rtol):
    for array, true, dtype in zip(got, truth, dtypes, strict=True):
        assert (array.dtype, array.shape, array.weak_type) == (dtype, true.shape, False)
        np.testing.assert_allclose(np.asarray(array, np.float64), true, rtol=rtol, atol=rtol)


@BOTH
@pytest.mark.parametrize("options", SGD_OPTIONS)
def test_sgd_momentum_equals_the_oracle(options, implementation):
    p, g, v = arrays(3)
    got = kernels.sgd_momentum(p, g, v, learning_rate=0.1, implementation=implementation, **options)
    truth = oracles.sgd_momentum(p, g, v, learning_rate=0.1, **options)
    check(got, truth, (p.dtype, v.dtype), 1e-6)


@BOTH
@pytest.mark.parametrize("options", ADAM_OPTIONS)
def test_adamw_equals_the_oracle(options, implementation):
    p, g, m, v = arrays(4)
    update = jax.jit(
        lambda step: kernels.adamw(p, g, m, v, step=step, implementation=implementation, **options)
    )
    for step in (0, 1, 1000, 10**6):
        truth = oracles.adamw(p, g, m, v, step=step, **options)
        check(update(jnp.int32(step)), truth, (p.dtype,) * 3, 2e-6)


@BOTH
@EVERY_UPDATE
def test_float64_is_computed_in_float64(update, oracle, count, implementation):
    with jax.enable_x64(True):
        operands = arrays(count, jnp.float64)
        got = update(*operands, implementation=implementation)
        check(got, oracle(*operands), (jnp.float64,) * (count - 1), 1e-13)


@BOTH
@EVERY_UPDATE
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (1023,), (1025,)])
def test_any_size(shape, update, oracle, count, implementation):
    operands = arrays(count, shape=shape)
    got = jax.jit(partial(update, implementation=implementation))(*operands)
    check(got, oracle(*operands), (jnp.float32,) * (count - 1), 2e-6)


@EVERY_UPDATE
def test_every_block_of_a_pallas_kernel_is_updated(update, oracle, count):
    from txcore.kernels.optimizer import pallas

    operands = arrays(count, shape=(100,))
    options = {"implementation": "pallas", "config": pallas.Config(32)}
    got = jax.jit(partial(update, **options))(*operands)
    check(got, oracle(*operands), (jnp.float32,) * (count - 1), 2e-6)


@BOTH
@EVERY_UPDATE
def test_a_scaled_gradient_is_unscaled_before_all_else(update, oracle, count, implementation):
    p, g, *state = arrays(count)
    want = oracle(p, g, *state)
    run = jax.jit(
        lambda g, scale: update(p, g, *state, grad_scale=scale, implementation=implementation)
    )
    dtypes = (jnp.float32,) * (count - 1)
    check(run(g * 1024, jnp.float32(1 / 1024)), want, dtypes, 2e-6)
    small = (g / 2**20).astype(jnp.float16)  # too small for float16 once unscaled there
    truth = oracle(p, np.asarray(small, np.float64) / 2**20, *state)
    check(run(small, jnp.float32(2.0**-20)), truth, dtypes, 2e-6)


@BOTH
@EVERY_UPDATE
def test_cast_rounds_the_new_parameter_once(update, oracle, count, implementation):
    operands = arrays(count)
    run = partial(update, implementation=implementation)
    new, *_, half = jax.jit(partial(run, cast=jnp.bfloat16))(*operands)
    np.testing.assert_array_equal(half, new.astype(jnp.bfloat16))
    operands = [x.astype(jnp.bfloat16) for x in operands]
    *got, wide = jax.jit(partial(run, cast="float32"))(*operands)
    assert [x.dtype for x in got] == [jnp.bfloat16] * (count - 1)
    np.testing.assert_allclose(wide, oracle(*operands)[0], rtol=2e-6, atol=2e-6)


@BOTH
@EVERY_UPDATE
def test_what_is_not_finite_stays_in_its_place(update, oracle, count, implementation):
    p, g, *state = arrays(count, shape=(9,))
    run = jax.jit(partial(update, implementation=implementation))
    clean = run(p, g, *state)
    for bad in (np.nan, np.inf, -np.inf):
        for array, other in zip(run(p, g.at[4].set(bad), *state), clean, strict=True):
            assert not np.isfinite(array[4])
            np.testing.assert_array_equal(np.delete(array, 4), np.delete(other, 4))


@BOTH
@EVERY_UPDATE
def test_vmap(update, oracle, count, implementation):
    operands = arrays(count)
    scales = jnp.linspace(0.5, 2.0, SHAPE[0])
    mapped = jax.vmap(
        lambda scale, *row: update(*row, grad_scale=scale, implementation=implementation)
    )
    p, g, *state = operands
    truth = oracle(p, g * scales[:, None], *state)
    check(jax.jit(mapped)(scales, *operands), truth, (jnp.float32,) * (count - 1), 2e-6)


@pytest.fixture(scope="module")
def mesh():
    return machine.mesh(data=3)


@BOTH
@EVERY_UPDATE
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("split", [P(), P("data")])
def test_whole_and_sharded_arrays_in_shard_map(
    split, checked, update, oracle, count, implementation, mesh
):
    operands = arrays(count)
    mapped = jax.shard_map(
        partial(update, implementation=implementation),
        mesh=mesh,
        in_specs=split,
        out_specs=split,  # refused by jax where whole arrays give what varies
        check_vma=checked,
    )
    check(jax.jit(mapped)(*operands), oracle(*operands), (jnp.float32,) * (count - 1), 2e-6)


@BOTH
@EVERY_UPDATE
def test_gradients_that_vary_update_whole_parameters_apart(
    update, oracle, count, implementation, mesh
):
    p, g, *state = arrays(count)
    mapped = jax.shard_map(
        lambda p, g, *state: update(p[:11], g, *state, implementation=implementation),
        mesh=mesh,
        in_specs=(P(), P("data"), *(P("data") for _ in state)),
        out_specs=P("data"),
    )
    tripled = jnp.concatenate([p[:11]] * 3)
    check(jax.jit(mapped)(p, g, *state), oracle(tripled, g, *state), (p.dtype,) * (count - 1), 2e-6)


@machine.cpu_only("XLA allocates other buffers elsewhere")
@EVERY_UPDATE
def test_donated_arrays_are_updated_in_place(update, oracle, count):
    operands = [jnp.ones(4096)] * count
    donated = (0, *range(2, count))
    compiled = jax.jit(update, donate_argnums=donated).lower(*operands).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 4 * 4096 * (count - 1)
    assert memory.temp_size_in_bytes < 4096  # no other buffer, for all that a loop may need


BAD = {
    "grad_scale": (
        {"grad_scale": jnp.ones(2)},
        ValueError,
        "grad_scale needs to be a scalar, got",
    ),
    "rates": (
        {"learning_rate": jnp.ones(2)},
        ValueError,
        "learning_rate needs to be a scalar, got shape (2,): use jax.vmap for several at once",
    ),
    "cast": (
        {"cast": "int8"},
        TypeError,
        "cast needs a floating-point dtype or None, got int8: name the dtype of "
        "the next forward pass, such as jnp.bfloat16",
    ),
    "triton": (
        {"implementation": "triton_ir"},
        NotImplementedError,
        "implementation='triton_ir' was asked for, but",
    ),
    "config": (
        {"implementation": "xla", "config": 3},
        TypeError,
        "implementation='xla' needs no config, got int: leave config out for the best guess",
    ),
}


@EVERY_UPDATE
@pytest.mark.parametrize("bad", BAD)
def test_bad_options_are_refused(bad, update, oracle, count):
    options, error, text = BAD[bad]
    with pytest.raises(error, match=re.escape(text)):
        update(*arrays(count), **options)


@BOTH
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_error_is_at_most_twice_that_of_the_plain_expression(dtype, implementation):
    p, g, m, v = arrays(4, dtype)
    # Optax, with its whole state in the parameter's dtype, is the plain expression.
    adam = optax.adamw(1e-2, weight_decay=0.1, mu_dtype=dtype)
    state = adam.init(p)
    state = (state[0]._replace(mu=m, nu=v), *state[1:])
    changes, _ = adam.update(g, state, p)
    plain = optax.apply_updates(p, changes)
    got = kernels.adamw(p, g, m, v, step=0, implementation=implementation, **ADAM)[0]
    truth = oracles.adamw(p, g, m, v, step=0, **ADAM)[0]
    assert error(got, truth) <= 2 * error(plain, truth)

    plain_v = 0.9 * v + g
    plain = p - 0.1 * plain_v
    got, got_v = kernels.sgd_momentum(
        p, g, v, learning_rate=0.1, momentum=0.9, implementation=implementation
    )
    truth, true_v = oracles.sgd_momentum(p, g, v, learning_rate=0.1, momentum=0.9)
    assert error(got, truth) <= 2 * error(plain, truth)
    assert error(got_v, true_v) <= 2 * error(plain_v, true_v)


def error(got, truth):
    return float(np.linalg.norm(np.asarray(got, np.float64) - truth))


def test_dtypes_may_differ_and_each_is_kept():
    p, g, m, v = arrays(4)
    p, g = p.astype(jnp.bfloat16), g.astype(jnp.float16)
    got = kernels.adamw(p, g, m, v, step=0, **ADAM)
    check(got[1:], oracles.adamw(p, g, m, v, step=0, **ADAM)[1:], (jnp.float32,) * 2, 1e-6)
    assert got[0].dtype == jnp.bfloat16
    new, velocity = kernels.sgd_momentum(p, g, v, learning_rate=0.1, momentum=0.9)
    assert (new.dtype, velocity.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_learning_rate_may_be_traced():
    p, g, v = arrays(3)
    update = jax.jit(lambda rate: kernels.sgd_momentum(p, g, v, learning_rate=rate, momentum=0.9))
    truth = oracles.sgd_momentum(p, g, v, learning_rate=0.25, momentum=0.9)
    check(update(jnp.float32(0.25)), truth, (p.dtype,) * 2, 1e-6)


@pytest.mark.parametrize(
    "version, reason",
    {
        None: "its kernel needs the package jax-triton (pip install 'txcore[triton]')",
        "0.4.1": "its kernel needs jax-triton 0.3, and 0.4.1 is installed",
        "0.3.1": None,
    }.items(),
)
def test_another_jax_triton_is_refused(version, reason, monkeypatch):
    monkeypatch.setattr(jax_triton_calls, "_find_version", lambda package: version)
    shapes, dtypes = ((8,),) * 3, ("float32",) * 3
    what = Problem("sgd_momentum", "gpu", "NVIDIA H100", shapes, dtypes, (("dtypes", dtypes[:2]),))
    assert SGD_MOMENTUM["jax_triton"].refuse(what) == reason
