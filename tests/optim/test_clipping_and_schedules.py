"""Clipping and schedules against NumPy and optax."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import txcore as tx

GRADS = {"a": jnp.array([3.0, 0.0]), "b": {"c": jnp.array(4.0)}}


def test_global_norm():
    assert float(tx.optim.global_norm(GRADS)) == 5.0
    assert float(tx.optim.global_norm({})) == 0.0
    assert tx.optim.global_norm({}).dtype == jnp.float32


def test_the_norm_of_half_precision_leaves_is_computed_in_float32():
    norm = tx.optim.global_norm([jnp.full(10**4, 300, jnp.float16), jnp.zeros(3, jnp.bfloat16)])
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, 3e4, rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0.1, 4.999, 5.0, 100])
def test_clip_equals_optax(max_norm):
    clip = optax.clip_by_global_norm(max_norm)
    want, _ = clip.update(GRADS, clip.init(GRADS))
    got = tx.optim.clip_by_global_norm(GRADS, max_norm)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    assert float(tx.optim.global_norm(got)) == pytest.approx(min(5.0, max_norm), rel=1e-6)


def test_clip_keeps_dtypes_and_zeros():
    got = tx.optim.clip_by_global_norm([jnp.zeros(2, jnp.bfloat16), jnp.zeros(())], 1.0)
    assert [leaf.dtype for leaf in got] == [jnp.bfloat16, jnp.float32]
    assert not any(leaf.any() for leaf in got)
    assert tx.optim.clip_by_global_norm({}, 1.0) == {}


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_gradient_that_is_not_finite_is_not_turned_into_zeros(bad):
    grads = {"a": jnp.array([1.0, bad]), "b": jnp.array(2.0)}
    assert not np.isfinite(tx.optim.global_norm(grads))
    clipped = tx.optim.clip_by_global_norm(grads, 1.0)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(clipped))


def values(schedule, steps):
    got = [jax.jit(schedule)(jnp.int32(step)) for step in steps]
    assert {(v.dtype, v.shape, v.weak_type) for v in got} == {(jnp.dtype("float32"), (), False)}
    return [float(v) for v in got]


def test_constant():
    assert values(tx.optim.constant(0.25), [0, 10**6]) == [0.25, 0.25]


def test_warmup_of_a_number_and_of_a_schedule():
    assert values(tx.optim.warmup(1.0, 4), range(6)) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    halving = tx.optim.warmup(lambda step: 0.5**step, 2)
    assert values(halving, range(4)) == [0.5, 0.5, 0.25, 0.125]
    assert values(tx.optim.warmup(1.0, 0), [0]) == [1.0]


def test_cosine_equals_optax_and_stays_at_its_end():
    steps = range(0, 130, 7)
    got = values(tx.optim.cosine(0.4, 100, end=0.1), steps)
    want = [float(optax.cosine_decay_schedule(0.4, 100, alpha=0.25)(s)) for s in steps]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got[-1] == pytest.approx(0.1)


def test_cosine_with_warmup():
    got = values(tx.optim.cosine(1.0, 110, warmup_steps=10), range(111))
    np.testing.assert_allclose(got[:10], np.arange(1, 11) / 10, rtol=1e-6)
    want = [(1 + math.cos(math.pi * t / 100)) / 2 for t in range(101)]
    np.testing.assert_allclose(got[10:], want, atol=1e-6)
    assert got[9] == got[10] == 1.0


def test_linear_scaling():
    assert tx.optim.linear_scaling(0.1, 8192, 256) == pytest.approx(3.2)


BAD = {
    "negative rate": (
        lambda: tx.optim.sgd(-0.1),
        ValueError,
        "sgd: learning_rate needs a finite number of at least 0, got -0.1",
    ),
    "nan rate": (
        lambda: tx.optim.adamw(float("nan")),
        ValueError,
        "adamw: learning_rate needs a finite number of at least 0, got nan",
    ),
    "rate as text": (
        lambda: tx.optim.sgd("0.1"),
        TypeError,
        "sgd: learning_rate needs a number or a schedule (step -> float32 scalar), got str: "
        "pass a float, or a function such as tx.optim.cosine(...)",
    ),
    "momentum of one": (
        lambda: tx.optim.sgd(0.1, momentum=1.0),
        ValueError,
        "sgd: momentum needs a finite number in [0, 1), got 1.0",
    ),
    "nesterov alone": (
        lambda: tx.optim.sgd(0.1, nesterov=True),
        ValueError,
        "sgd: nesterov=True needs a momentum above 0, got 0: pass momentum=0.9",
    ),
    "negative decay": (
        lambda: tx.optim.sgd(0.1, weight_decay=-1),
        ValueError,
        "sgd: weight_decay needs a finite number of at least 0, got -1",
    ),
    "clip at zero": (
        lambda: tx.optim.sgd(0.1, clip_norm=0),
        ValueError,
        "sgd: clip_norm needs a number above 0, got 0: a usual value is 1.0, and None does not "
        "clip",
    ),
    "clip at nan": (
        lambda: tx.optim.clip_by_global_norm(GRADS, float("nan")),
        ValueError,
        "clip_by_global_norm: max_norm needs a number above 0, got nan: a usual value is 1.0",
    ),
    "b1": (
        lambda: tx.optim.adamw(0.1, b1=1.5),
        ValueError,
        "adamw: b1 needs a finite number in [0, 1), got 1.5",
    ),
    "eps": (
        lambda: tx.optim.adamw(0.1, eps=-1e-8),
        ValueError,
        "adamw: eps needs a finite number of at least 0, got -1e-08",
    ),
    "adamw decay": (
        lambda: tx.optim.adamw(0.1, weight_decay=float("inf")),
        ValueError,
        "adamw: weight_decay needs a finite number of at least 0, got inf",
    ),
    "schedule of vectors": (
        lambda: tx.optim.sgd(lambda step: jnp.ones(2)).update(GRADS, {}, GRADS, step=jnp.int32(0)),
        ValueError,
        "sgd: learning_rate(step) needs to be a scalar, got shape (2,): return one number for "
        "the step that is passed",
    ),
    "constant": (
        lambda: tx.optim.constant(-1.0),
        ValueError,
        "constant: value needs a finite number of at least 0, got -1.0",
    ),
    "warm-up of a half": (
        lambda: tx.optim.warmup(0.1, 0.5),
        ValueError,
        "warmup: warmup_steps needs an int of at least 0, got 0.5",
    ),
    "cosine shorter than its warm-up": (
        lambda: tx.optim.cosine(0.1, 10, warmup_steps=10),
        ValueError,
        "cosine: total_steps needs an int of at least 11, got 10",
    ),
    "cosine's end": (
        lambda: tx.optim.cosine(0.1, 10, end=-0.1),
        ValueError,
        "cosine: end needs a finite number of at least 0, got -0.1",
    ),
    "batch of none": (
        lambda: tx.optim.linear_scaling(0.1, 0, 256),
        ValueError,
        "linear_scaling: batch_size needs an int of at least 1, got 0",
    ),
    "integer parameter": (
        lambda: tx.optim.adamw(0.1).init({"w": GRADS["a"], "steps": jnp.int32(3)}),
        TypeError,
        "adamw: every parameter needs a floating-point dtype, got int32 for params['steps']: "
        "keep what is not trained out of the parameters (engine.create_state takes it as "
        "extra=)",
    ),
    "gradient missing": (
        lambda: tx.optim.sgd(0.1).update({"a": GRADS["a"]}, {}, GRADS, step=0),
        ValueError,
        "sgd needs gradients with the leaves of the parameters, got leaf ['b']['c'] in the "
        "parameters and not in the gradients: differentiate with respect to all the parameters "
        "that init was given",
    ),
    "gradient of another shape": (
        lambda: tx.optim.sgd(0.1).update({**GRADS, "a": jnp.ones(3)}, {}, GRADS, step=0),
        ValueError,
        "sgd needs gradients with the shapes of the parameters, got leaf ['a'] with (3,) where "
        "its parameter has (2,): reduce gradients without changing their shape, and call init "
        "again when the parameters change",
    ),
    "state of other parameters": (
        lambda: tx.optim.sgd(0.1, momentum=0.9).update(
            GRADS, tx.optim.sgd(0.1, momentum=0.9).init({"z": jnp.ones(1)}), GRADS, step=0
        ),
        ValueError,
        "sgd needs optimizer state with the leaves of the parameters, got leaf ['a'] in the "
        "parameters and not in the optimizer state: differentiate with respect to all the "
        "parameters that init was given",
    ),
    "a number": (
        lambda: tx.optim.as_optimizer(0.1),
        TypeError,
        "optimizer needs to be a tx.optim optimizer or an optax GradientTransformation (with "
        "init and update), got 0.1 (float): pass tx.optim.sgd(0.01), for example",
    ),
    "not called": (
        lambda: tx.optim.as_optimizer(tx.optim.sgd),
        TypeError,
        "optimizer needs to be a tx.optim optimizer or an optax GradientTransformation, got "
        "the function 'sgd': call it with its options, for example sgd(0.01)",
    ),
    "from_optax of nothing": (
        lambda: tx.optim.from_optax(None),
        TypeError,
        "from_optax: transformation needs to be an optax GradientTransformation (with init and "
        "update), got None (NoneType): pass tx.optim.sgd(0.01), for example",
    ),
    "optax gradient missing": (
        lambda: tx.optim.from_optax(optax.sgd(0.1)).update({}, (), GRADS, step=0),
        ValueError,
        "from_optax needs gradients with the leaves of the parameters, got leaf ['a'] in the "
        "parameters and not in the gradients: differentiate with respect to all the parameters "
        "that init was given",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_refused(bad):
    call, error, text = BAD[bad]
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_as_optimizer_takes_ours_and_optax():
    ours = tx.optim.sgd(0.1)
    assert tx.optim.as_optimizer(ours) is ours
    assert isinstance(tx.optim.as_optimizer(optax.adam(0.1)), tx.optim.Optimizer)
