"""DP(sync_every=, outer=): each device by itself for some steps, then parameters are averaged."""

import re

import checkpoint_cases as cases
import jax
import numpy as np
import optax
import pytest
import split_models
import toys
from local_sgd_oracle import Local

import txcore as tx
from txcore.profiling.report import PlanLine

pytestmark = pytest.mark.sampled(2)

DILOCO = tx.optim.sgd(0.7, momentum=0.9, nesterov=True)


def plan(every=4, outer=None, **options):
    return tx.Plan(data_parallel=tx.DP("data", sync_every=every, outer=outer), **options)


def batches(count, masked=0):
    return [toys.batch(16, seed=i, masked=masked) for i in range(count)]


def local_loss(params, batch):
    """The mean over this device's real examples, however many the others have."""
    values = toys.losses(params, batch) * batch["mask"]
    return values.sum() / batch["mask"].sum()


@tx.step_fn
def step(state, batch):
    loss, grads = tx.value_and_grad(local_loss)(state.params, batch)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}


def assert_near(params, wanted, rtol=2e-5):
    for name, array in wanted.items():
        np.testing.assert_allclose(params[name], array, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize(
    "n, every, outer",
    [(1, 4, None), (2, 4, None), (4, 3, None), (4, 4, (0.7, 0.9)), (1, 4, (0.7, 0.9))],
)
def test_as_in_float64(n, every, outer):
    """The stored parameters are the last average, and the reported loss is the global mean."""
    optimizer = tx.optim.sgd(0.05, momentum=0.9)
    engine = toys.engine(n, plan=plan(every, outer and DILOCO), optimizer=optimizer)
    state, params = engine.create_state(toys.params()), toys.params()
    truth = Local(params, n, every, rate=0.05, momentum=0.9, outer=outer)
    for batch in batches(2 * every + 1):
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], truth.step(batch), rtol=2e-5)
        assert_near(state.stored_params, truth.stored)
    engine.check_replicas(state)
    state = engine.end_round(state)
    truth.average()
    assert_near(state.stored_params, truth.stored)
    assert int(state.step) == truth.steps
    assert engine.end_round(engine.create_state(params)).comm_state is not None


def test_one_device_clips_by_its_own_norm():
    optimizer = tx.optim.sgd(0.05, clip_norm=0.5)
    engine = toys.engine(4, plan=plan(2), optimizer=optimizer)
    state, truth = (
        engine.create_state(toys.params()),
        Local(toys.params(), 4, 2, rate=0.05, clip=0.5),
    )
    for batch in batches(4):
        state, _ = step(state, batch)
        truth.step(batch)
    assert_near(state.stored_params, truth.stored)


@pytest.mark.parametrize(
    "optimizer", [optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.05)), optax.adam(0.01)]
)
def test_any_optax_optimizer_is_a_local_one(optimizer):
    """Its gradients are whole; what it counts is counted on each device."""
    engine = toys.engine(2, plan=plan(2), optimizer=optimizer)
    state = engine.create_state(toys.params())
    ends = [toys.params()] * 2
    kept = [optimizer.init(toys.params())] * 2
    for batch in batches(4):
        state, _ = step(state, batch)
        for i in (0, 1):
            part = {name: np.split(x, 2)[i] for name, x in batch.items()}
            grads = jax.grad(local_loss)(ends[i], part)
            changes, kept[i] = optimizer.update(grads, kept[i], ends[i])
            ends[i] = optax.apply_updates(ends[i], changes)
        if int(state.step) % 2 == 0:
            ends = [jax.tree.map(lambda a, b: (a + b) / 2, *ends)] * 2
    assert_near(state.stored_params, ends[0])


def test_parameters_in_parts():
    """Over (data, model): as over data alone."""
    ends = []
    for model in (1, 2):
        optimizer = tx.optim.adamw(0.05, clip_norm=1.0)
        engine = tx.Engine(
            mesh=split_models.mesh(2, model),
            plan=plan(2, DILOCO, params=split_models.RULES),
            optimizer=optimizer,
        )
        state = engine.create_state(split_models.params())
        for seed in range(5):
            state, _ = split_models.train_step(state, split_models.batch(seed))
        state = engine.end_round(state)
        ends.append(jax.tree.map(np.asarray, state.stored_params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *ends)


def test_what_is_evaluated_and_given_is_the_last_average():
    engine = toys.engine(2, plan=plan(4))
    state = engine.create_state(toys.params())
    before = jax.tree.map(np.asarray, state.stored_params)
    wanted = engine.evaluate(toys.eval_step, state, batches(1))
    for batch in batches(3):
        state, _ = step(state, batch)
    assert engine.evaluate(toys.eval_step, state, batches(1)) == wanted
    jax.tree.map(np.testing.assert_array_equal, before, state.params)
    # Parameters from elsewhere are what each device goes on from, with what it has done since.
    moved = jax.tree.map(np.asarray, state.comm_state["local"].difference)
    state = state.replace(stored_params=jax.tree.map(lambda x: x + 1, before))
    state = engine.end_round(state)
    for name, difference in moved.items():
        wanted = before[name] + 1 + difference.mean(0)
        np.testing.assert_allclose(state.stored_params[name], wanted, rtol=1e-5, atol=1e-6)


def test_fit_says_that_the_last_steps_are_not_averaged(caplog):
    engine = toys.engine(2, plan=plan(4))
    state = engine.fit(step, engine.create_state(toys.params()), batches(6), steps=6)
    (text,) = [m for m in toys.messages(caplog) if "average" in m]
    assert text == (
        "txcore: fit ends 2 steps after the last average of the parameters (DP(sync_every=)): "
        "engine.end_round(state) averages them now"
    )
    caplog.clear()
    engine.fit(step, state, batches(8), steps=8)
    assert not toys.messages(caplog)


@pytest.mark.parametrize("outer", [None, DILOCO], ids=["average", "outer"])
def test_a_run_resumed_within_a_round_is_the_uninterrupted_one(outer, tmp_path):
    """Saved after 9 of 14 steps, in rounds of 4."""
    given = {"plan": plan(4, outer)}
    curve, whole = cases.train(None, **given)
    cases.train(tmp_path, steps=10, **given)
    for folder in cases.saved(tmp_path)[2:]:
        assert folder in ("step_00000009", "step_00000010")
    resumed, state = cases.train(tmp_path, resume="must", **given)
    assert resumed.steps == {s: m for s, m in curve.steps.items() if s > 10}
    jax.tree.map(np.testing.assert_array_equal, state.arrays, whole.arrays)


def test_an_overflow_on_one_device_skips_the_step_on_all():
    @tx.step_fn
    def half(state, batch):
        both = tx.value_and_grad(toys.local_loss, loss_scale=state.loss_scale)
        loss, grads = both(state.params, batch)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    engine = toys.engine(2, plan=plan(2), precision=tx.Precision("float16", loss_scale=64.0))
    state = engine.create_state(toys.params())
    state, _ = half(state, toys.batch(seed=0))
    before = jax.tree.map(np.asarray, {**state.arrays, "loss_scaling": None})
    bad = toys.batch(seed=1)
    bad["x"][0, 0] = np.inf  # of the first device
    state, _ = half(state, bad)
    assert int(state.loss_scaling.skipped_steps) == 1
    after = {**state.arrays, "loss_scaling": None}
    jax.tree.map(np.testing.assert_array_equal, before, after)
    state, _ = half(state, toys.batch(seed=2))
    assert int(state.step) == 2
    report = engine.audit(half, state, bad)
    assert report.exact, report
    sent = [(line.what, line.axes, line.payload_bytes, line.found_bytes) for line in report.plan]
    assert sent[:2] == [("parameters", ("data",), 160, 160), ("finite gradients", ("data",), 4, 4)]


@pytest.mark.parametrize("outer", [None, DILOCO], ids=["average", "outer"])
@pytest.mark.parametrize("n", [2, 8])
def test_the_audit_is_exact_and_as_predicted(n, outer):
    optimizer = tx.optim.adamw(0.1, clip_norm=1.0)
    engine = toys.engine(n, plan=plan(8, outer), optimizer=optimizer)
    state = engine.create_state(toys.params())
    report = engine.audit(step, state, toys.batch(2 * n))
    assert report.exact, report
    assert report.plan == (
        PlanLine("parameters", "all-reduce", ("data",), "float32", 160, 160, every=8),
        PlanLine("pmean/loss", "all-reduce", ("data",), "float32", 0, 4),
    )
    assert ", the parameters in 1 call of 8" in report.verdict()


def test_a_metric_of_one_device_is_refused():
    @tx.step_fn
    def wrong(state, batch):
        loss, grads = tx.value_and_grad(local_loss)(state.params, batch)
        return state.apply_gradients(grads=grads), {"loss": loss}

    state = toys.engine(2, plan=plan(4)).create_state(toys.params())
    with pytest.raises(ValueError, match=r"metrics\['loss'\] varies along axis 'data'"):
        wrong(state, toys.batch())


def test_local_gradients_are_for_this_plan_alone():
    @tx.step_fn
    def unreduced(state, batch):
        loss, grads = tx.value_and_grad(local_loss)(state.params, batch)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    unreduced(toys.engine(2, plan=plan(4)).create_state(toys.params()), toys.batch())
    with pytest.raises(ValueError, match="apply_gradients needs reduced gradients"):
        unreduced(toys.engine(2).create_state(toys.params()), toys.batch())


@pytest.mark.parametrize(
    "options, text",
    [
        ({"sync_every": 0}, "DP needs sync_every= steps from 1 on, got 0"),
        ({"sync_every": 2.0}, "DP needs sync_every= steps from 1 on, got 2.0"),
        ({"outer": DILOCO}, "DP needs sync_every= above 1 with outer=, got 1"),
        ({"sync_every": 8, "outer": optax.sgd(1.0)}, "DP needs outer= an optimizer of tx.optim"),
        (
            {"sync_every": 8, "shard": "optimizer"},
            "DP needs shard=None with sync_every=8, got 'optimizer': no gradient is sent",
        ),
        ({"sync_every": 8, "delay": 1}, "DP needs delay=0 with sync_every=8, got 1: no gradient"),
        (
            {"sync_every": 8, "reduction": "adasum"},
            "DP needs reduction='mean' with sync_every=8, got 'adasum': no gradient is sent",
        ),
    ],
)
def test_refused(options, text):
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        tx.DP("data", **options)


def test_an_optimizer_of_all_examples_gradients_is_refused():
    optimizer = tx.optim.from_optax(optax.sgd(0.1), per_example=True)
    engine = toys.engine(2, plan=plan(8), optimizer=optimizer)
    text = r"DP\(axis='data', sync_every=8\) needs an optimizer that takes one gradient a param"
    with pytest.raises(ValueError, match=text):
        engine.create_state(toys.params())
    keyed = tx.optim.Optimizer(lambda p: {"key": jax.random.key(0)}, lambda g, s, p, step: (p, s))
    with pytest.raises(TypeError, match=r"got PRNG keys in state.opt_state\['key'\]"):
        toys.engine(2, plan=plan(8), optimizer=keyed).create_state(toys.params())
