"""assert_plans_agree on both sides: right steps pass, whatever rounding does; wrong ones do not.

TXCORE_ALL_PARITY=1 runs every wrong step on every model, and more seeds of the right ones.
"""

import logging
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity_models as pm
import pytest
import toys

import txcore as tx
from txcore.parity import Agreement, norm_of, of_inputs, of_rounding

ALL = os.environ.get("TXCORE_ALL_PARITY") == "1"
AGREEMENT = Agreement("step 0", {4: "devices"}, 1e-4, 1e-6)
LEAVES = {"large": 1e3, "middle": 1.0, "small": 1e-4, "bias": 1e-2}


def tree(seed=0):
    random = np.random.default_rng(seed)
    shapes = {"large": (50, 40), "middle": (20,), "small": (8, 3), "bias": (1,)}
    return {name: scale * random.normal(size=shapes[name]) for name, scale in LEAVES.items()}


def rounded(numbers, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x * (1 + 1e-6 * random.normal(size=x.shape)), numbers)


def check(first, second):
    """Compare as assert_plans_agree does gradients, with probes that rounding changes by 1e-6."""
    probes = [rounded(first, seed) for seed in range(4)]
    excuse = of_rounding(first, lambda: probes, 1.2e-7 * norm_of(first))
    AGREEMENT.check("gradients of params", first, second, excuse=excuse)


FAULTS = {
    "N": lambda x: 4 * x,
    "1/N": lambda x: x / 4,
    "another sign": lambda x: -x,
    "zero": lambda x: 0 * x,
    "one device's": lambda x: x + 0.3 * np.random.default_rng(5).normal(size=x.shape) * abs(x),
    "one percent": lambda x: 1.01 * x,
    "one element": lambda x: np.concatenate([4 * x.reshape(-1)[:1], x.reshape(-1)[1:]]).reshape(
        x.shape
    ),
}


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("fault", FAULTS)
def test_one_wrong_leaf_is_found_beside_others(leaf, fault):
    first = tree()
    second = rounded(first, 9)
    second[leaf] = FAULTS[fault](second[leaf])
    with pytest.raises(AssertionError, match=re.escape(f"of params['{leaf}'] differs")) as caught:
        check(first, second)
    text = str(caught.value)
    count = int(text.partition("plans: ")[2].partition(" of ")[0])
    assert count == 1 if fault == "one element" else count > first[leaf].size / 3
    named = {"N": " = N for N = 4", "1/N": " = 1/N for N = 4", "another sign": "the sign is"}
    if fault in named:
        assert named[fault] in text


def test_what_is_really_0_may_differ_by_the_last_place_of_all():
    first = tree()
    second = rounded(first, 9)
    first["bias"], second["bias"] = np.array([3e-9]), np.array([-8e-4])
    noise = [{**rounded(first, 1), "bias": np.array([sign * 2e-9])} for sign in (-1, 1)]
    last_place = 1.2e-7 * norm_of(first)  # 5e-3
    AGREEMENT.check("x", first, second, excuse=of_rounding(first, lambda: noise, last_place))
    for other in ({**second, "bias": np.array([1e-2])}, {**second, "small": 4 * second["small"]}):
        with pytest.raises(AssertionError, match="differs between the plans"):
            AGREEMENT.check("x", first, other, excuse=of_rounding(first, lambda: noise, last_place))


def test_few_elements_are_named_as_a_tie():
    first = tree()
    second = rounded(first, 9)
    second["large"][:2, :2] *= 1.5
    text = "4 of 2000 elements, largest difference "
    with pytest.raises(AssertionError, match=re.escape(text)) as caught:
        check(first, second)
    assert str(caught.value).endswith(
        "; so few may be a tie (of a max-pool, a sort, an argmax) that the plans break "
        "differently, but rounding otherwise does not show it"
    )


def test_noise_excuses_no_factor():
    """Where rounding changes a leaf by 10%, half of it is still a difference."""
    first = {"w": np.linspace(1, 2, 50)}
    noisy = [{"w": first["w"] * (1 + 0.1 * (-1) ** np.arange(50))}]
    for factor, passes in ((1.2, True), (0.5, False), (2, False), (-1, False)):
        second = {"w": factor * first["w"]}
        if passes:
            AGREEMENT.check("x", first, second, excuse=of_rounding(first, lambda: noisy))
        else:
            with pytest.raises(AssertionError, match="50 of 50 elements"):
                AGREEMENT.check("x", first, second, excuse=of_rounding(first, lambda: noisy))


def test_an_update_may_follow_its_gradient_alone():
    first, second = {"w": np.zeros(3)}, {"w": np.array([1e-3, 0, 0])}
    made = of_inputs(lambda: {"w": np.array([1e-3, 0, 0])})
    AGREEMENT.check("update", first, second, excuse=made)
    with pytest.raises(AssertionError, match="1 of 3 elements"):
        AGREEMENT.check(
            "update", first, second, excuse=of_inputs(lambda: {"w": np.array([0, 1e-3, 0])})
        )


def pooling_step(otherwise):
    """A max over two patches, which are a tie for the first example on one device."""

    @tx.step_fn
    def step(state, batch):
        def loss_of(w):
            patches = batch["x"] @ w
            return otherwise(patches).max(1).mean()

        loss, grads = tx.value_and_grad(loss_of)(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    return step


def patches():
    x = np.random.default_rng(0).uniform(0, 1, (16, 2, 2)).astype(np.float32)
    x[0] = [[1, 2], [2, 1]]
    return [{"x": x}]


def test_a_tie_that_rounding_breaks_passes_and_is_noted(caplog):
    def rounds(x):
        return x * (1 + np.float32([0, 2.4e-7]) * (tx.axis_size("data") > 1))

    caplog.set_level(logging.INFO, "txcore")
    tx.testing.assert_plans_agree(
        pooling_step(rounds),
        np.ones(2, np.float32),
        patches(),
        engines=(toys.engine(1), toys.engine(4)),
    )
    text = "gradients of params: 2 of 2 elements differ: rounding changes them as much"
    assert text in caplog.text


def test_what_no_rounding_does_is_found_beside_a_tie():
    def leans(x):
        return x * (1 + np.float32([0, 0.05]) * (tx.axis_size("data") > 1))

    with pytest.raises(AssertionError, match="step 0: metrics"):
        tx.testing.assert_plans_agree(
            pooling_step(leans),
            np.ones(2, np.float32),
            patches(),
            engines=(toys.engine(1), toys.engine(4)),
        )


def test_an_optimizer_that_is_another_one_is_found():
    """The gradients agree, the updates do not."""
    engines = toys.engine(1), toys.engine(4, optimizer=tx.optim.sgd(0.4))
    text = r"step 0: update of params\['w1'\] .* = N for N = 4 devices"
    with pytest.raises(AssertionError, match=text):
        tx.testing.assert_plans_agree(
            toys.train_step, toys.params(), [toys.batch()], engines=engines
        )


def test_optimizer_state_is_compared():
    def wrong(grads, state, params, *, step):
        right = adamw.update(grads, state, params, step=step)
        return right[0], {**right[1], "m": jax.tree.map(lambda m: 2 * m, right[1]["m"])}

    adamw = tx.optim.adamw(1e-3)
    engines = (
        toys.engine(1, optimizer=adamw),
        toys.engine(2, optimizer=tx.optim.Optimizer(adamw.init, wrong)),
    )
    with pytest.raises(AssertionError, match=r"step 0: optimizer state\['m'\]\['w1'\] differs"):
        tx.testing.assert_plans_agree(
            toys.train_step, toys.params(), [toys.batch()], engines=engines
        )


@pytest.mark.parametrize("model", pm.MODELS if ALL else ["mlp"])
def test_a_right_model_agrees(model):
    """With Adam, a bias before a batch normalisation, a padded batch; a max-pool in two of them."""
    for seed in range(8 if ALL else 1):
        tx.testing.assert_plans_agree(
            pm.make_step(model),
            pm.params(model, seed),
            pm.batches(seed),
            engines=pm.engines(model),
            extra=pm.extra(model),
        )


def on_one(name, how):
    """Reduce all leaves rightly but one."""

    def reduce(grads):
        right = tx.pmean(grads, "data")
        return {**right, name: how(grads[name], right[name])}

    return reduce


def local_moments(x, axis, *, mask):
    """Average what should be merged: a mean of variances, over padding too."""
    dims = tuple(range(x.ndim - 1))
    return tx.pmean((x.mean(dims), x.var(dims)), axis)


def of_device_0(tree):
    return tx.broadcast(tree, "data")


def mean_of_means(logits, batch):
    losses = -jax.nn.log_softmax(logits)[jnp.arange(len(logits)), batch["y"]]
    return (losses * batch["mask"]).sum() / jnp.maximum(batch["mask"].sum(), 1)


def sign_of(grad, right):
    return right if tx.axis_size("data") == 1 else -right


WRONG = {
    "summed": {"reduce": lambda g: tx.psum(g, "data")},
    "averaged twice": {
        "reduce": lambda g: jax.tree.map(lambda x: x / tx.axis_size("data"), tx.pmean(g, "data"))
    },
    "device 0's gradients": {"reduce": of_device_0},
    "one leaf summed": {"reduce": on_one("b2", lambda g, right: tx.psum(g, "data"))},
    "one leaf of device 0": {"reduce": on_one("w1", lambda g, right: of_device_0(g))},
    "one leaf's sign": {"reduce": on_one("w0", sign_of)},
    "mean of means": {"loss": mean_of_means},
    "local statistics": {"moments": local_moments},
    "device 0's loss": {"report": of_device_0},
    "loss summed": {"report": lambda x: tx.psum(x, "data")},
}


@pytest.mark.skipif(not ALL, reason="TXCORE_ALL_PARITY=1 runs them")
@pytest.mark.parametrize("model", pm.MODELS)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_model_is_found(name, model):
    if name == "local statistics" and model == "plain":
        pytest.skip("it has none")
    with pytest.raises(AssertionError, match="differs between the plans"):
        tx.testing.assert_plans_agree(
            pm.make_step(model, **WRONG[name]),
            pm.params(model, 0),
            pm.batches(0),
            engines=pm.engines(model),
            extra=pm.extra(model),
        )
