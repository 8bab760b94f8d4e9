"""NaN and infinity in training: stop, skip or ignore, and which leaf is named."""

import logging
import re

import float16_steps as f16
import jax
import numpy as np
import pytest
import toys

import txcore as tx

BAD = 3  # the batch with a value that is not finite


def batches(value=np.nan):
    """Six batches, the fourth with `value` in one example."""
    made = [toys.batch() for _ in range(6)]
    y = np.array(made[BAD]["y"])
    y[5] = value
    made[BAD] = {**made[BAD], "y": y}
    return made


@pytest.mark.parametrize("value, shown", [(np.nan, "nan"), (np.inf, "inf")])
def test_stop_names_step_and_leaves(value, shown):
    engine = toys.engine(2)
    text = (
        f"the loss of step 4 is {shown}. Not finite after it: params['w1'] (32 of 32 elements), "
        "params['w2'] (8 of 8 elements). Lower the learning rate, clip the gradients or look at "
        "that batch; Engine(on_nonfinite='skip') leaves out such steps"
    )
    with pytest.raises(FloatingPointError, match=f"^{re.escape(text)}$"):
        engine.fit(toys.train_step, engine.create_state(toys.params()), batches(value), steps=6)


def test_a_loss_that_alone_is_not_finite():
    @tx.step_fn
    def step(state, batch):
        return state, {"loss": tx.pmean(batch["y"].sum(), "data")}

    engine = toys.engine(1)
    with pytest.raises(FloatingPointError, match="The parameters are finite: the batch or the lo"):
        engine.fit(step, engine.create_state(toys.params()), batches(), steps=6)


@pytest.mark.parametrize("n", [1, 4])
def test_skip_leaves_out_the_step_bit_for_bit(n, caplog):
    def trained(data, **options):
        engine = toys.engine(n, **options)
        state = engine.create_state(toys.params(), extra={"seen": np.float32(0)})
        return engine.fit(toys.train_step, state, data, steps=len(data))

    data = batches()
    with caplog.at_level(logging.WARNING, "txcore"):
        state = trained(data, on_nonfinite="skip")
    without = trained(data[:BAD] + data[BAD + 1 :])
    same = f16.on_host((state.stored_params, state.opt_state, state.step))
    jax.tree.map(
        np.testing.assert_array_equal,
        same,
        f16.on_host((without.stored_params, without.opt_state, without.step)),
    )
    assert int(state.loss_scaling.skipped_steps) == 1
    assert state.loss_scale is None, "float32 has no loss scale to pass on"
    assert toys.messages(caplog) == [
        "txcore: the loss of step 4 is nan; 1 step was skipped, the last because the gradient of "
        "params['w1'] was not finite"
    ]


def test_skip_names_the_leaf_whose_gradient_was_not_finite():
    @tx.step_fn
    def step(state, batch):
        grads = jax.tree.map(lambda p: p * 0, state.stored_params)
        grads["w2"] = grads["w2"] + batch["y"].sum()
        return state.apply_gradients(grads=tx.pmean(tx.vary(grads, "data"), "data")), {}

    engine = toys.engine(1, on_nonfinite="skip")
    state = engine.create_state(toys.params())
    for batch in batches():
        state, _ = step(state, batch)
    assert tx.train.numerics.nonfinite.describe_skipped(state) == (
        "1 step was skipped, the last because the gradient of params['w2'] was not finite"
    )


def test_no_step_was_skipped():
    engine = toys.engine(1, on_nonfinite="skip")
    state = engine.fit(toys.train_step, engine.create_state(toys.params()), [toys.batch()], steps=1)
    assert tx.train.numerics.nonfinite.describe_skipped(state) == "no step was skipped"


def test_ignore_goes_on_with_nan():
    engine = toys.engine(1, on_nonfinite="ignore")
    state = engine.fit(toys.train_step, engine.create_state(toys.params()), batches(), steps=6)
    assert int(state.step) == 6
    assert np.isnan(state.params["w1"]).all()


def test_float16_lowers_its_scale_and_stops_at_the_minimum(caplog):
    engine = f16.engine(precision=f16.policy(initial=64, minimum=1))
    state = engine.create_state(toys.params())
    data = [f16.huge(toys.batch(), 0)] * 20
    text = (
        r"^the loss of step \d is nan\. The loss scale is 1, its minimum\. The parameters are fini"
    )
    with pytest.raises(FloatingPointError, match=text):
        engine.fit(f16.train_step, state, data, steps=20)
    assert "the loss of step 1 is nan; " in toys.messages(caplog)[0]
    assert (
        "steps were skipped, the last because the gradient of params['w1']"
        in toys.messages(caplog)[0]
    )


def nan_loss_of_float16(on_nonfinite):
    engine = f16.engine(precision=tx.Precision("float16", 1024.0), on_nonfinite=on_nonfinite)
    data = [f16.huge(toys.batch(), 0)] * 3
    return engine.fit(f16.train_step, engine.create_state(toys.params()), data, steps=3)


def test_a_constant_loss_scale_stops_at_once(caplog):
    text = (
        "the loss of step 1 is nan. The loss scale is 1024, and constant. The parameters are "
        "finite: the batch or the loss itself made it. Lower the learning rate, clip the gradients "
        "or look at that batch; Engine(on_nonfinite='skip') leaves out such steps"
    )
    with pytest.raises(FloatingPointError, match=f"^{re.escape(text)}$"):
        nan_loss_of_float16("stop")
    assert toys.messages(caplog) == []


def test_with_skip_it_goes_on(caplog):
    state = nan_loss_of_float16("skip")
    assert int(state.loss_scaling.skipped_steps) == 3
    assert len(toys.messages(caplog)) == 3


@pytest.mark.parametrize("value, shown", [([1.0, np.nan], r"\[1.0, nan\]"), ([np.inf], r"\[inf\]")])
def test_a_loss_that_is_no_scalar(value, shown):
    @tx.step_fn
    def step(state, batch):
        return state, {"loss": np.float32(value)}

    engine = toys.engine(1)
    with pytest.raises(FloatingPointError, match=f"^the loss of step 1 is {shown}. "):
        engine.fit(step, engine.create_state(toys.params()), [toys.batch()], steps=1)


def test_an_unknown_policy():
    text = "Engine needs on_nonfinite= 'stop', 'skip' or 'ignore', got 'halt'"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        toys.engine(1, on_nonfinite="halt")
