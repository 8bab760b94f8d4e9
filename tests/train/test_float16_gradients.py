"""value_and_grad(loss_scale=): unscaled float32 results, and what float16 steps are refused."""

import functools
import re

import float16_steps as f16
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import PartitionSpec as P

import txcore as tx

AXIS = {"axis": "data"}


def sharded(f, *args, n=2):
    """Run on n devices, the first argument as it is, the others sharded."""
    specs = (P(), *[P("data")] * (len(args) - 1))
    return tx.testing.run_sharded(f, *args, axes={"data": n}, in_specs=specs, out_specs=P())


X = np.arange(1.0, 9.0, dtype=np.float32)


@pytest.mark.parametrize("scale", [None, 2.0**10, 3.0, jnp.float32(512), np.float64(2)], ids=str)
@pytest.mark.parametrize("has_aux", [False, True])
def test_loss_and_gradients_come_out_unscaled(scale, has_aux):
    """mean(w^2 x), x = 1..8: the loss is 9 x 4.5, the gradient 6 x 4.5."""

    def f(w, x):
        def loss_of(w):
            loss = jnp.mean(w.astype(jnp.float16) ** 2 * x.astype(jnp.float16))
            return (loss, {"count": x.size}) if has_aux else loss

        options = {"has_aux": has_aux, "loss_scale": scale, **AXIS}
        value, gradient = tx.value_and_grad(loss_of, **options)(w)
        alone = tx.grad(loss_of, **options)(w)
        if has_aux:
            (value, aux), (alone, _) = value, alone
            assert aux == {"count": 4}
        assert gradient.dtype == alone.dtype == jnp.float32
        return tx.pmean((value.astype(jnp.float32), gradient, alone), "data")

    value, gradient, alone = sharded(f, np.float32(3), X)
    assert value == 40.5
    np.testing.assert_allclose([gradient, alone], 27, rtol=2**-10)


def test_the_loss_is_scaled_in_float32_and_the_reported_one_is_what_it_was():
    """3 x 2**15 is more than float16 holds, and 2**15 x the gradient, 1, is not."""

    def f(w, x):
        loss, g = tx.value_and_grad(
            lambda w: jnp.sum(w.astype(jnp.float16)) + x[0] * 0, loss_scale=2.0**15, **AXIS
        )(w)
        return tx.pmean((loss, g), "data")

    loss, gradient = sharded(f, np.float32([1, 2]), X)
    assert loss == 3
    assert gradient.tolist() == [1, 1]


def test_an_overflow_stays_one():
    def f(w, x):
        g = tx.grad(lambda w: jnp.sum(w.astype(jnp.float16) * x[0]), loss_scale=2.0**17, **AXIS)(w)
        return tx.pmean(g, "data")

    assert not np.isfinite(sharded(f, np.float32([1, 2]), X)).any()


def test_several_arguments_and_trees():
    def f(w, x):
        def loss_of(tree, x, scale):
            return jnp.sum(tree["a"] * scale) + jnp.sum(tree["b"] * 2) + 0 * x[0]

        step = tx.value_and_grad(loss_of, (0, -1), loss_scale=64.0, **AXIS)
        loss, (tree, scale) = step({"a": w, "b": w.astype(jnp.bfloat16)}, x, w[0])
        assert tree["b"].dtype == jnp.bfloat16
        return tx.pmean((loss, tree["a"], scale), "data")

    loss, a, scale = sharded(f, np.float32([1, 2]), X)
    assert (loss, a.tolist(), scale) == (9, [1, 1], 3)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        loss, gradient = f64_gradient()
    assert (loss.dtype, gradient.dtype) == (np.float64, np.float64)
    assert (float(loss), float(gradient)) == (0.1**2, 2 * 0.1)


def f64_gradient():
    def f(w):
        return tx.value_and_grad(lambda w: w * w, loss_scale=1024.0, **AXIS)(w)

    return tx.testing.run_sharded(f, np.float64(0.1), axes={"data": 1}, in_specs=P(), out_specs=P())


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), True, "dynamic", 2**16 * 1j], ids=repr)
def test_refuses_what_is_no_scale(scale):
    with pytest.raises(TypeError, match=re.escape("needs loss_scale= state.loss_scale, or")):
        tx.value_and_grad(lambda w: w, loss_scale=scale)


def test_refuses_the_whole_of_the_scaling_and_arrays_of_scales():
    state = f16.engine().create_state(np.float32(0))
    for scale in (state.loss_scaling, np.ones(2, np.float32), np.int32(4)):
        with pytest.raises(TypeError, match=re.escape("another floating-point scalar above 0")):
            tx.grad(lambda w: w, loss_scale=scale)


def test_refuses_gradients_in_float16_and_losses_that_are_no_numbers_to_scale():
    def half(w, x):
        w = {"w": w.astype(jnp.float16)}
        return tx.grad(lambda w: jnp.sum(w["w"]) * x[0], loss_scale=2.0, **AXIS)(w)

    text = (
        "needs arguments in float32 to unscale their gradients without loss, got float16 at "
        "['w']: keep the parameters in float32, and cast them inside the function that is "
        "differentiated, by state.precision.cast(params)"
    )
    with pytest.raises(TypeError, match=re.escape(text)):
        sharded(half, np.ones(2, np.float32), X)

    def whole(w, x):
        loss_of = lambda w: jnp.sum(w * x[0]).astype(int)  # noqa: E731
        return tx.grad(loss_of, loss_scale=2.0, **AXIS)(w)

    with pytest.raises(TypeError, match="needs a floating-point loss to scale, got int32"):
        sharded(whole, np.ones(2, np.float32), X)


def loss_of(params, batch):
    return toys.local_loss(params, batch)


def by_jax(state, batch):
    return jax.value_and_grad(loss_of)(state.params, batch)


def by_a_scale_of_its_own(state, batch):
    return tx.value_and_grad(loss_of, loss_scale=1024.0)(state.params, batch)


def by_hand(state, batch):
    """Finite differences, say: no derivative of jax's at all."""
    loss = loss_of(state.params, batch)
    return loss, jax.tree.map(lambda p: p * loss, state.params)


@jax.jit
def compiled_gradients(params, batch, scale):
    return tx.value_and_grad(loss_of, loss_scale=scale)(params, batch)


def step_with(both):
    @tx.step_fn
    def step(state, batch):
        loss, grads = both(state, batch)
        # The scale in a metric does not count: the parameters have to be made by it.
        metrics = {"loss": tx.pmean(loss, "data"), "scale": state.loss_scale}
        return state.apply_gradients(grads=tx.pmean(grads, "data")), metrics

    return step


NO_PART = (
    "step computes in float16, but state.loss_scale had no part in its new parameters: gradients "
    "below 6e-8 came out as zeros. Write loss, grads = tx.value_and_grad(loss_of, "
    "loss_scale=state.loss_scale)(state.params); the same line works in every precision"
)
NO_SCALE = (
    "a step in float16 needs tx.value_and_grad(f, loss_scale=state.loss_scale) (or tx.grad with "
    "it), got no loss_scale: gradients below 6e-8 would come out as zeros. The same line works in "
    "every precision"
)


def plain(state, batch):
    return tx.value_and_grad(loss_of)(state.params, batch)


def plain_grad(state, batch):
    return jnp.float32(0), tx.grad(loss_of)(state.params, batch)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "both,text",
    [
        (plain, NO_SCALE),
        (plain_grad, NO_SCALE),
        (by_jax, NO_PART),
        (by_a_scale_of_its_own, NO_PART),
        (by_hand, NO_PART),
    ],
)
def test_refuses_a_float16_step_that_does_not_scale_its_loss(both, text, n):
    state = f16.engine(n).create_state(toys.params())
    with pytest.raises(ValueError, match=re.escape(text)):
        step_with(both)(state, toys.batch())
    assert not state.step.is_deleted()


def by_the_scale_in_jax(state, batch):
    loss, grads = jax.value_and_grad(lambda p: loss_of(p, batch) * state.loss_scale)(state.params)
    return jax.tree.map(lambda x: x / state.loss_scale, (loss, grads))


def compiled_apart(state, batch):
    return compiled_gradients(state.params, batch, state.loss_scale)


def recomputed(state, batch):
    remat = jax.checkpoint(functools.partial(loss_of, batch=batch))
    return tx.value_and_grad(remat, loss_scale=state.loss_scale)(state.params)


@pytest.mark.parametrize("both", [by_the_scale_in_jax, compiled_apart, recomputed])
def test_accepts_every_way_to_scale_a_loss_also_where_jax_has_traced_it_before(both):
    for _ in range(2):  # another engine: jax remembers the inner program, txcore's check not
        state = f16.engine(2, precision=f16.policy(initial=256)).create_state(toys.params())
        state, metrics = step_with(both)(state, toys.batch())
        new, loss = toys.reference_step(toys.params(), toys.batch())
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(state.params["w1"], new["w1"], rtol=1e-5)
