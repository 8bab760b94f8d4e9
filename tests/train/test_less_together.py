"""Accumulation, local SGD, delayed gradients and Adasum with each other, with shards, resumed."""

import os
import pathlib
import subprocess
import sys

import checkpoint_cases as cases
import jax
import numpy as np
import pytest
import toys
from killed_less_run import PLANS, plan

import txcore as tx

pytestmark = pytest.mark.sampled(2)

ALL = os.environ.get("TXCORE_ALL_PLANS") == "1"
RUN = pathlib.Path(__file__).with_name("killed_less_run.py")


def step_of(microbatches):
    @tx.step_fn
    def step(state, batch):
        both = tx.value_and_grad(toys.local_loss, microbatches=microbatches)
        loss, grads = both(state.params, batch)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}

    return step


def end_of(microbatches=None, n=4, **options):
    """Train a few steps; return the stored parameters, having proved the step."""
    engine = toys.engine(
        n,
        plan=tx.Plan(data_parallel=tx.DP("data", **options)),
        optimizer=tx.optim.adamw(0.05, clip_norm=1.0),
    )
    state, step = engine.create_state(toys.params()), step_of(microbatches)
    report = engine.audit(step, state, toys.batch(32))
    assert report.exact, report
    for seed in range(3):
        state, _ = step(state, toys.batch(32, seed=seed, masked=6 * seed))
    return jax.tree.map(np.asarray, state.stored_params), report


def assert_same(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


@pytest.fixture(scope="module")
def plain():
    return end_of(n=1)[0]


@pytest.mark.parametrize("shard", ["optimizer", "gradients", "parameters"])
def test_accumulation_in_shards(shard, plain):
    """Sent once, but where a device keeps no more than its part of the sum."""
    params, report = end_of(4, shard=shard)
    assert_same(params, plain, rtol=2e-4, atol=1e-5)
    (line,) = [line for line in report.plan if line.what == "gradients"]
    assert (line.payload_bytes, line.found_bytes, line.times) == (160, 160, 1)
    reduced = {row.trips for row in report.collectives if row.kind == "reduce-scatter"}
    assert reduced == ({1} if shard == "optimizer" else {4})


@pytest.mark.parametrize(
    "options, tolerance",
    [
        ({"shard": "optimizer"}, 1e-4),
        ({"compression": "bf16"}, 2e-2),
        ({"compression": "int8", "shard": "optimizer"}, 5e-2),
    ],
)
def test_delayed_and_sent_otherwise(options, tolerance):
    wanted, _ = end_of(delay=1)
    found, _ = end_of(4, delay=1, **options)
    assert_same(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{"sync_every": 2}, {"reduction": "adasum"}])
def test_accumulated(options):
    assert_same(end_of(4, **options)[0], end_of(**options)[0], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLANS)
def test_killed_and_resumed_it_is_the_uninterrupted_run(name, tmp_path):
    if not ALL and name != "diloco":
        pytest.skip("TXCORE_ALL_PLANS=1 kills a run under each plan")
    done = subprocess.run([sys.executable, str(RUN), name, str(tmp_path)], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    curve, whole = cases.train(None, plan=plan(name))
    resumed, state = cases.train(tmp_path, resume="must", plan=plan(name))
    first = min(resumed.steps)  # the checkpoint of step 9 may not be whole yet
    assert first in (7, 10)
    assert resumed.steps == {s: m for s, m in curve.steps.items() if s >= first}
    jax.tree.map(np.testing.assert_array_equal, state.arrays, whole.arrays)


@pytest.mark.parametrize("name", ["diloco", "delayed"])
def test_saved_on_2_devices_it_goes_on_on_4(name, tmp_path):
    """Each of them with the mean of what the two had: what is next averaged is the same."""
    cases.train(tmp_path, steps=6, plan=plan(name))
    with tx.Checkpoints(tmp_path, every=3, resume="must") as checkpoints:
        engine = cases.engine(4, plan=plan(name))
        there, _ = checkpoints.restore(cases.start(engine))
    with tx.Checkpoints(tmp_path, every=3, resume="must") as checkpoints:
        here, _ = checkpoints.restore(cases.start(cases.engine(2, plan=plan(name))))
    pairs = zip(*(jax.tree.leaves(x.comm_state) for x in (here, there)), strict=True)
    for two, four in (map(np.asarray, pair) for pair in pairs):
        if two.shape == four.shape:  # of the outer optimizer
            np.testing.assert_array_equal(two, four)
        else:
            assert four.shape[0] == 4
            np.testing.assert_allclose(np.mean(two, 0), four[0], rtol=1e-6, atol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, here.stored_params, there.stored_params)
    curve, _ = cases.train(tmp_path, n=4, resume="must", plan=plan(name))
    assert sorted(curve.steps) == list(range(7, cases.STEPS + 1))
