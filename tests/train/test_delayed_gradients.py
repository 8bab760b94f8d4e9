"""DP(delay=1): each step updates by the gradients of the step before."""

import re

import checkpoint_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import split_models
import toys
from local_sgd_oracle import gradient, widen

import txcore as tx
from txcore.profiling.report import PlanLine
from txcore.testing import run_sharded

PLAN = tx.Plan(data_parallel=tx.DP("data", delay=1))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_as_in_float64(n):
    """The first step's gradients are zeros, those of the last step are never used."""
    engine = toys.engine(n, plan=PLAN, optimizer=tx.optim.sgd(0.05, momentum=0.9))
    state, params = engine.create_state(toys.params()), widen(toys.params())
    before = velocity = {name: np.zeros_like(x) for name, x in params.items()}
    for seed in range(4):
        batch = toys.batch(16, seed=seed, masked=seed)
        state, metrics = toys.train_step(state, batch)
        grads, loss = gradient(params, batch)
        velocity = {name: 0.9 * velocity[name] + before[name] for name in params}
        params = {name: x - 0.05 * velocity[name] for name, x in params.items()}
        before = grads
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        for name, wanted in params.items():
            np.testing.assert_allclose(state.stored_params[name], wanted, rtol=1e-5, atol=1e-6)
    assert int(state.step) == 4


@pytest.mark.parametrize(
    "delay, momentum, most", [(0, 0.9, 3.8), (1, 0.9, 0.1), (0, 0.0, 2.0), (1, 0.0, 1.0)]
)
def test_the_largest_rate_of_a_curvature_of_one(delay, momentum, most):
    """2 (1 + m) without a delay, 1 - m with it, as docs/local-sgd.md says."""

    @tx.step_fn
    def step(state, batch):
        grads = tx.grad(lambda w: jnp.mean(batch) * w**2 / 2)(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {}

    for factor in (0.75, 1.25):
        optimizer = tx.optim.sgd(factor * most, momentum=momentum)
        plan = tx.Plan(data_parallel=tx.DP("data", delay=delay))
        state = toys.engine(1, plan=plan, optimizer=optimizer).create_state(np.float32(1))
        last = []
        for i in range(200):
            state, _ = step(state, np.ones(2, np.float32))
            if i >= 175:  # it swings
                last.append(abs(float(state.stored_params)))
        assert (max(last) < 1) == (factor < 1)


def test_parameters_in_parts():
    ends = []
    for model in (1, 2):
        engine = tx.Engine(
            mesh=split_models.mesh(2, model),
            plan=tx.Plan(data_parallel=tx.DP("data", delay=1), params=split_models.RULES),
            optimizer=tx.optim.adamw(0.05, clip_norm=1.0),
        )
        state = engine.create_state(split_models.params())
        for seed in range(3):
            state, _ = split_models.train_step(state, split_models.batch(seed))
        ends.append(jax.tree.map(np.asarray, state.stored_params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *ends)


def test_in_a_shard_map_of_ones_own():
    def f(grads, kept):
        means, comm = tx.sync_gradients({"w": grads}, "data", delay=1, comm_state={"delayed": kept})
        return means["w"], comm["delayed"]["w"]

    grads, kept = np.arange(4.0, dtype=np.float32), {"w": np.full((2, 2), [[3.0], [5.0]])}
    specs = (jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data"))
    means, now = run_sharded(f, grads, kept, axes={"data": 2}, out_specs=specs)
    np.testing.assert_array_equal(means, [4, 4])
    np.testing.assert_array_equal(now, grads.reshape(2, 2))
    text = (
        "sync_gradients(delay=1) needs comm_state={'delayed': ...} with the gradients of the step"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        run_sharded(lambda g: tx.sync_gradients(g, "data", delay=1)[0], grads, axes={"data": 2})


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    curve, whole = cases.train(None, plan=PLAN)
    cases.train(tmp_path, steps=10, plan=PLAN)
    resumed, state = cases.train(tmp_path, resume="must", plan=PLAN)
    assert resumed.steps == {s: m for s, m in curve.steps.items() if s > 10}
    jax.tree.map(np.testing.assert_array_equal, state.arrays, whole.arrays)


def test_one_step_that_is_not_finite_skips_one_step():
    """Undone with the rest, the gradients that were not finite would come back in every step."""
    engine = toys.engine(2, plan=PLAN, on_nonfinite="skip")
    state = engine.create_state(toys.params())
    bad = toys.batch(seed=1)
    bad["x"][0, 0] = np.inf
    seen = []
    for batch in (toys.batch(seed=0), bad, toys.batch(seed=2), toys.batch(seed=3)):
        state, _ = toys.train_step(state, batch)
        seen.append((int(state.step), int(state.loss_scaling.skipped_steps)))
    assert seen == [(1, 0), (2, 0), (2, 1), (3, 1)]
    assert np.isfinite(state.stored_params["w1"]).all()


@pytest.mark.parametrize("n", [2, 8])
def test_the_audit_is_exact_and_as_predicted(n):
    engine = toys.engine(n, plan=PLAN)
    state = engine.create_state(toys.params())
    report = engine.audit(toys.train_step, state, toys.batch(2 * n))
    assert report.exact, report
    (line, *beyond) = report.plan
    assert line == PlanLine(
        "gradients", "all-reduce", ("data",), "float32", 160, 160, factor="mean"
    )
    assert {line.what for line in beyond} == {"pmean/loss", "psum/example_count"}


def test_a_step_that_averages_by_itself_is_refused():
    """Its own gradients would be applied at once, and those that are kept never."""

    @tx.step_fn
    def step(state, batch):
        loss, grads = tx.value_and_grad(toys.local_loss)(state.params, batch)
        state = state.apply_gradients(grads=tx.pmean(grads, "data"))
        return state, {"loss": tx.pmean(loss, "data")}

    text = r"step needs to reduce its gradients by grads, state = state.sync_gradients\(grads\) und"
    with pytest.raises(ValueError, match=text):
        step(toys.engine(2, plan=PLAN).create_state(toys.params()), toys.batch())


@pytest.mark.parametrize(
    "options, text",
    [
        ({"delay": 2}, "DP needs delay= 0 or 1 steps, got 2"),
        ({"delay": 0.5}, "DP needs delay= 0 or 1 steps, got 0.5"),
        (
            {"delay": 1, "shard": "gradients"},
            "DP needs shard= 'optimizer' or None with delay=1, go",
        ),
        ({"delay": 1, "shard": "parameters"}, "got 'parameters': there each gradient is reduced"),
    ],
)
def test_refused(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        tx.DP("data", **options)


def test_an_optimizer_of_all_examples_gradients_is_refused():
    optimizer = tx.optim.from_optax(optax.sgd(0.1), per_example=True)
    with pytest.raises(ValueError, match="needs an optimizer that takes one gradient a parameter"):
        toys.engine(2, plan=PLAN, optimizer=optimizer).create_state(toys.params())
