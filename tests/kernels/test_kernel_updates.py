"""The updates of one array against float64 NumPy and optax."""

import jax
import jax.numpy as jnp
import kernel_oracles as oracles
import numpy as np
import optax
import pytest

from txcore import kernels

SHAPE = (33, 7)
SGD_OPTIONS = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
]
ADAM = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
ADAM_OPTIONS = [ADAM, {**ADAM, "b1": 0.0, "b2": 0.0}, {**ADAM, "weight_decay": 0.0, "eps": 0.1}]


def arrays(count, dtype=jnp.float32, seed=0):
    random = np.random.default_rng(seed)
    made = [random.normal(size=SHAPE) for _ in range(count)]
    made[-1] = np.abs(made[-1])  # AdamW's second moment
    return [jnp.asarray(a, dtype) for a in made]


def check(got, truth, dtypes, rtol):
    for array, true, dtype in zip(got, truth, dtypes, strict=True):
        assert (array.dtype, array.shape, array.weak_type) == (dtype, SHAPE, False)
        np.testing.assert_allclose(np.asarray(array, np.float64), true, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("options", SGD_OPTIONS)
def test_sgd_momentum_equals_the_oracle(options):
    p, g, v = arrays(3)
    got = kernels.sgd_momentum(p, g, v, learning_rate=0.1, **options)
    truth = oracles.sgd_momentum(p, g, v, learning_rate=0.1, **options)
    check(got, truth, (p.dtype, v.dtype), 1e-6)


@pytest.mark.parametrize("step", [0, 1, 1000, 10**6])
@pytest.mark.parametrize("options", ADAM_OPTIONS)
def test_adamw_equals_the_oracle(options, step):
    p, g, m, v = arrays(4)
    update = jax.jit(lambda step: kernels.adamw(p, g, m, v, step=step, **options))
    truth = oracles.adamw(p, g, m, v, step=step, **options)
    check(update(jnp.int32(step)), truth, (p.dtype,) * 3, 2e-6)


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        p, g, m, v = arrays(4, jnp.float64)
        got = kernels.adamw(p, g, m, v, step=jnp.int32(3), **ADAM)
        check(got, oracles.adamw(p, g, m, v, step=3, **ADAM), (jnp.float64,) * 3, 1e-13)
        moved = kernels.sgd_momentum(p, g, v, learning_rate=0.1, momentum=0.9)
        truth = oracles.sgd_momentum(p, g, v, learning_rate=0.1, momentum=0.9)
        check(moved, truth, (jnp.float64,) * 2, 1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_error_is_at_most_twice_that_of_the_plain_expression(dtype):
    p, g, m, v = arrays(4, dtype)
    # Optax, with its whole state in the parameter's dtype, is the plain expression.
    adam = optax.adamw(1e-2, weight_decay=0.1, mu_dtype=dtype)
    state = adam.init(p)
    state = (state[0]._replace(mu=m, nu=v), *state[1:])
    changes, _ = adam.update(g, state, p)
    plain = optax.apply_updates(p, changes)
    got = kernels.adamw(p, g, m, v, step=0, **ADAM)[0]
    truth = oracles.adamw(p, g, m, v, step=0, **ADAM)[0]
    assert error(got, truth) <= 2 * error(plain, truth)

    plain_v = 0.9 * v + g
    plain = p - 0.1 * plain_v
    got, got_v = kernels.sgd_momentum(p, g, v, learning_rate=0.1, momentum=0.9)
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
