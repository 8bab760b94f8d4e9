"""Rows whose loss does not count have a gradient of 0; against float64 NumPy."""

import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from cross_entropy_cases import Loss, blocked, blocked_or_not, with_options
from jax.sharding import PartitionSpec as P
from kernel_oracles import linear_cross_entropy as linear_oracle
from kernel_oracles import smoothed_cross_entropy as logits_oracle

import txcore as tx
from txcore import kernels

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

LOGITS, LINEAR = Loss((9,), 37), Loss((9,), 37, features=7)
EVERY = pytest.mark.parametrize("loss, variant", blocked_or_not(LOGITS, LINEAR))
MASKED = {1: -100, 2: -1, 4: 37, 5: 40, 7: np.iinfo(np.int32).min, 8: np.iinfo(np.int32).max}
VALID = np.array([i not in MASKED for i in range(9)])


def labels_with_masked_rows():
    labels = np.array(LOGITS.labels)
    labels[list(MASKED)] = list(MASKED.values())
    return jnp.asarray(labels)


def truth(args, labels, g, label_smoothing):
    """Return the losses of the valid rows, and the gradients that these alone give."""
    labels, g = np.asarray(labels)[VALID], np.asarray(g, np.float64)[VALID]
    first, *rest = (np.asarray(a, np.float64) for a in args)
    oracle = linear_oracle if rest else logits_oracle
    out, (by_row, *others) = oracle(first[VALID], *rest, labels, lambda _: g, label_smoothing)
    rows = np.zeros(first.shape)
    rows[VALID] = by_row
    return out, (rows, *others)


def check(loss, variant, args, labels, dtype, smoothing):
    weight = jnp.asarray(np.where(VALID, np.linspace(-1, 2, 9), 0), jnp.float32)
    op = with_options(loss, variant, labels=labels, label_smoothing=smoothing)

    def run(*args):
        out, vjp = jax.vjp(op, *args)
        return out, vjp(weight)

    out, grads = jax.jit(run)(*args)
    clean = [jnp.where(VALID[:, None], args[0], 0), *args[1:]]
    want, true_grads = truth(clean, labels, weight, smoothing)
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-6
    np.testing.assert_allclose(out[VALID], want, rtol=tolerance, atol=tolerance)
    for grad, true in zip(grads, true_grads, strict=True):
        got = np.asarray(grad, np.float64)
        np.testing.assert_allclose(got, true, rtol=tolerance, atol=2 * tolerance)
    assert not np.asarray(grads[0])[~VALID].any()
    return out


@EVERY
def test_labels_that_are_no_class(loss, variant):
    out = check(loss, variant, loss.args(), labels_with_masked_rows(), jnp.float32, 0.1)
    np.testing.assert_array_equal(np.isnan(out), ~VALID)


@pytest.mark.parametrize("loss, variant", blocked(LOGITS, LINEAR))
def test_half_precision(loss, variant):
    args = loss.args(jnp.bfloat16)
    check(loss, variant, args, labels_with_masked_rows(), jnp.bfloat16, 0.1)


@pytest.mark.parametrize("loss, variant", blocked_or_not(LOGITS))
def test_logits_that_are_not_finite(loss, variant):
    """Classes that are ruled out do no harm in a masked row; a NaN stays in its own row."""
    logits = jnp.where(VALID[:, None], loss.args()[0], -jnp.inf)
    check(loss, variant, [logits], labels_with_masked_rows(), jnp.float32, 0.0)
    op = with_options(loss, variant, labels=labels_with_masked_rows())
    vjp = jax.vjp(op, logits.at[1, 20].set(jnp.nan))[1]
    (grad,) = vjp(jnp.asarray(VALID, jnp.float32))
    assert not np.isnan(np.delete(grad, 1, 0)).any()


@EVERY
def test_without_a_mask_each_is_nan_in_its_row_alone(loss, variant):
    labels = labels_with_masked_rows()
    op = with_options(loss, variant, labels=labels)
    (grad,) = jax.vjp(lambda x: op(x, *loss.args()[1:]), loss.args()[0])[1](jnp.ones(9))
    np.testing.assert_array_equal(np.isnan(grad).all(1), ~VALID)
    np.testing.assert_array_equal(np.isnan(grad).any(1), ~VALID)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_the_mean_over_the_valid_rows_on_several_devices(op, implementation):
    machine.mesh(data=4)
    random = np.random.default_rng(3)
    x, w = (random.normal(size=s).astype(np.float32) for s in ((8, 5), (5, 7)))
    labels = np.array([0, 1, 2, -100, 3, 4, 0, 1], np.int32)
    some: dict = {"implementation": implementation}

    def loss_of(w, x, labels):
        if op == "cross_entropy":
            losses = kernels.cross_entropy(x @ w, labels, **some)
        else:
            losses = kernels.linear_cross_entropy(x, w, None, labels, **some)
        mask = (labels >= 0).astype(jnp.float32)
        return tx.example_mean(losses, mask, axis="data")

    def on_device(w, x, labels):
        both = tx.value_and_grad(lambda w: loss_of(w, x, labels), axis="data")(w)
        return tx.pmean(both, "data")

    loss, grad = tx.testing.run_sharded(
        *(on_device, w, x, labels),
        axes={"data": 4},
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    valid = labels >= 0
    out, (_, dw, _) = linear_oracle(
        x[valid], w, np.zeros(7), labels[valid], lambda out: np.full(out.shape, 1 / 7)
    )
    np.testing.assert_allclose(loss, out.mean(), rtol=1e-6)
    np.testing.assert_allclose(grad, dw, rtol=1e-5, atol=1e-6)
