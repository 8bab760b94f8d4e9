"""assert_plans_agree: agrees where plans agree, and names the ratio where they do not."""

import re

import jax
import numpy as np
import pytest
import toys

import txcore as tx

BATCHES = [toys.batch(seed=i, masked=i) for i in range(3)]


def test_exact_plans_agree():
    for other in (
        toys.engine(2),
        toys.engine(8),
        toys.engine(0, mesh=toys.mesh(8, ("data", "x"), (4, 2))),
    ):
        tx.testing.assert_plans_agree(
            toys.train_step, toys.params(), BATCHES, engines=(toys.engine(1), other)
        )


def wrong_by(how):
    @tx.step_fn
    def step(state, batch):
        def loss_of(params):
            return toys.losses(params, batch).mean()

        loss, grads = tx.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=how(grads)), {"loss": tx.pmean(loss, "data")}

    return step


@pytest.mark.parametrize(
    "how,text",
    [
        (
            lambda g: tx.psum(g, "data"),
            "median ratio second/first 4 = N for N = 4 devices along 'data': summed where the mean "
            "is meant, or once more over it",
        ),
        (
            lambda g: jax.tree.map(lambda x: x / tx.axis_size("data"), tx.pmean(g, "data")),
            "median ratio second/first 0.25 = 1/N for N = 4 devices along 'data': averaged "
            "twice, or not summed over it",
        ),
    ],
    ids=["N", "1/N"],
)
def test_names_the_ratio(how, text):
    engines = (toys.engine(1), toys.engine(4))
    with pytest.raises(AssertionError, match=re.escape(text)) as caught:
        tx.testing.assert_plans_agree(wrong_by(how), toys.params(), [toys.batch()], engines=engines)
    assert "step 0: gradients of params['w1'] differs between the plans" in str(caught.value)


def test_names_a_difference_without_a_ratio():
    def only_rank_0(grads):
        zero = jax.tree.map(lambda x: x * (tx.axis_index("data") == 0), grads)
        return tx.psum(zero, "data")

    with pytest.raises(AssertionError, match="largest difference"):
        tx.testing.assert_plans_agree(
            wrong_by(only_rank_0),
            toys.params(),
            [toys.batch()],
            engines=(toys.engine(1), toys.engine(4)),
        )


def test_refuses_what_cannot_be_compared():
    engines = (toys.engine(1, seed=1), toys.engine(2, seed=2))
    with pytest.raises(ValueError, match="needs engines with one seed, got 1 and 2"):
        tx.testing.assert_plans_agree(toys.train_step, toys.params(), BATCHES, engines=engines)
    with pytest.raises(ValueError, match="needs at least one batch, got none"):
        tx.testing.assert_plans_agree(
            toys.train_step, toys.params(), [], engines=(toys.engine(1), toys.engine(2))
        )


def test_a_sum_of_a_mean_that_is_asked_for_is_caught_too():
    """The kit does not rely on txcore's guards: these take tx.vary at its word."""
    step = wrong_by(lambda g: tx.psum(tx.vary(tx.pmean(g, "data"), "data"), "data"))
    with pytest.raises(AssertionError, match="= N for N = 2 devices"):
        tx.testing.assert_plans_agree(
            step, toys.params(), [toys.batch()], engines=(toys.engine(1), toys.engine(2))
        )


@pytest.mark.parametrize(
    "optimizer",
    [tx.optim.adamw(1e-3), tx.optim.sgd(0.1, clip_norm=0.1)],
    ids=["adamw", "clip_norm"],
)
def test_an_optimizer_that_ignores_scale_hides_nothing(optimizer):
    engines = (toys.engine(1, optimizer=optimizer), toys.engine(4, optimizer=optimizer))
    step = wrong_by(lambda g: tx.psum(g, "data"))
    with pytest.raises(AssertionError, match="= N for N = 4 devices"):
        tx.testing.assert_plans_agree(step, toys.params(), [toys.batch()], engines=engines)


def reporting(metric):
    """A step that reports `metric` and changes nothing."""

    @tx.step_fn
    def step(state, batch):
        return state.replace(step=state.step + 1), {"x": metric(batch["y"])}

    return step


@pytest.mark.parametrize(
    "metric,text",
    [
        (lambda y: tx.psum(y.sum() * 0 + 1, "data") * np.inf, "metrics['x'] is not finite"),
        (lambda y: tx.psum(y, "data"), "metrics['x'] has shape (16,) and (8,)"),
    ],
    ids=["infinite", "another shape"],
)
def test_what_cannot_be_equal_is_a_difference(metric, text):
    with pytest.raises(AssertionError, match=re.escape(text)):
        tx.testing.assert_plans_agree(
            reporting(metric),
            toys.params(),
            [toys.batch()],
            engines=(toys.engine(1), toys.engine(2)),
        )


def test_extra_state_is_compared():
    @tx.step_fn
    def step(state, batch):
        count = tx.psum(batch["y"].sum() * 0 + 1, "data")
        return state.replace(step=state.step + 1, extra=state.extra + count), {"one": count * 0}

    with pytest.raises(AssertionError, match=r"step 0: extra differs .* ratio second/first 2"):
        tx.testing.assert_plans_agree(
            step,
            toys.params(),
            [toys.batch()],
            extra=np.float32(0),
            engines=(toys.engine(1), toys.engine(2)),
        )
