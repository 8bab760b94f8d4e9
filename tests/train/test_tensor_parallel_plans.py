"""Plan(tensor_parallel=): alone and with each way to exchange gradients, against NumPy."""

import jax
import numpy as np
import pytest
import split_models as models

import txcore as tx

pytestmark = pytest.mark.sampled(2)

TP = tx.TP("model", rules={"mlp/w1": -1, "mlp/b1": -1, "mlp/w2": -2})
EXACT = {
    "plain": {},
    "optimizer": {"shard": "optimizer"},
    "gradients": {"shard": "gradients"},
    "parameters": {"shard": "parameters"},
    "buckets": {"buckets": 1},
    "ring": {"algorithm": "ring"},
    "optimizer in buckets": {"shard": "optimizer", "buckets": 1},
}
# With what their curve is the same on model=1: rounding to int8 and the largest parts differ.
OTHER = {
    "bf16": ({"compression": "bf16"}, 1e-5),
    "delay": ({"delay": 1}, 1e-5),
    "local SGD": ({"sync_every": 2}, 1e-5),
    "DiLoCo": ({"sync_every": 2, "outer": tx.optim.sgd(0.7, momentum=0.9, nesterov=True)}, 1e-5),
    "int8": ({"compression": "int8"}, 0.02),
    "top_k": ({"compression": tx.compression.top_k(0.5)}, 0.1),
    "optimizer, int8": ({"shard": "optimizer", "compression": "int8"}, 0.02),
}


def plan(tensor=TP, **dp):
    return tx.Plan(data_parallel=tx.DP("data", **dp), tensor_parallel=tensor)


def run(shape, optimizer, start=None, **dp):
    """Train six steps; return the losses, the state, and the audit."""
    engine = tx.Engine(mesh=models.mesh(*shape), plan=plan(**dp), optimizer=optimizer)
    state, losses = engine.create_state(models.params() if start is None else start), []
    report = engine.audit(models.train_step, state, models.batch())
    for seed in range(6):
        state, metrics = models.train_step(state, models.batch(seed))
        losses.append(float(metrics["loss"]))
    return losses, state, report


def check_proof(report):
    """Everything declared, nothing left to autodiff, and what the plan predicts is there."""
    assert report.exact
    for line in report.plan:
        assert line.found_bytes == line.payload_bytes or line.at_most or not line.payload_bytes


@pytest.mark.parametrize("case", EXACT)
def test_an_exact_exchange_gives_the_curve_of_numpy(case):
    optimizer = tx.optim.sgd(0.1, momentum=0.9, clip_norm=0.5)
    losses, state, report = run((2, 2), optimizer, **EXACT[case])
    truth = models.Truth(models.params(), clip=0.5)
    known = [truth.step(models.batch(seed)) for seed in range(6)]
    np.testing.assert_allclose(losses, known, rtol=1e-5)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5),
        *(models.host(state.stored_params), truth.p),
    )
    check_proof(report)


@pytest.mark.parametrize("case", OTHER)
def test_another_exchange_gives_its_own_curve(case):
    options, rtol = OTHER[case]
    optimizer = tx.optim.sgd(0.1, momentum=0.9)
    losses, _, report = run((2, 2), optimizer, **options)
    np.testing.assert_allclose(losses, run((2, 1), optimizer, **options)[0], rtol=rtol)
    check_proof(report)


def test_powersgd_of_parts():
    """A device compresses its part of a gradient, for which its rank is as good."""
    options = {"compression": tx.compression.powersgd(rank=2)}
    rng = np.random.default_rng(0)
    start = models.params()
    start["mlp"] = {
        "w1": rng.normal(0, 0.3, (6, 64)).astype(np.float32),
        "b1": np.zeros(64, np.float32),
        "w2": rng.normal(0, 0.1, (64, 3)).astype(np.float32),
    }
    losses, _, report = run((2, 2), tx.optim.sgd(0.02), start, **options)
    plain, _, _ = run((1, 1), tx.optim.sgd(0.02), start)
    np.testing.assert_allclose(losses, plain, rtol=0.1)
    assert losses != plain
    check_proof(report)


@pytest.mark.parametrize("shard", [None, "optimizer"])
def test_muon_of_parts_is_that_of_the_whole(shard):
    optimizer = tx.optim.groups({"mlp/w*": tx.optim.muon(0.02), "*": tx.optim.adamw(0.01)})
    losses, _, report = run((2, 2), optimizer, shard=shard)
    np.testing.assert_allclose(losses, run((1, 1), optimizer)[0], rtol=2e-4)
    check_proof(report)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2), (4, 2), (1, 8)])
def test_its_rules_are_those_of_params_with_dims_from_the_end(shape):
    """So all that test_split_parameters.py shows of float16, clipping, checkpoints holds for it."""
    mesh = models.mesh(*shape)
    assert plan().layouts(models.params(), mesh) == models.plan().layouts(models.params(), mesh)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 2), (1, 4), (1, 8)])
def test_initial_values_do_not_depend_on_the_number_of_parts(shape):
    engine = tx.Engine(mesh=models.mesh(*shape), plan=plan(), optimizer=tx.optim.sgd(0.1))
    state = engine.create_state(models.params())
    jax.tree.map(np.testing.assert_array_equal, models.host(state.stored_params), models.params())
    parts = {
        shard.index[1]: shard.data for shard in state.stored_params["mlp"]["w1"].addressable_shards
    }
    whole = np.concatenate([parts[at] for at in sorted(parts, key=lambda at: at.start or 0)], 1)
    np.testing.assert_array_equal(whole, models.params()["mlp"]["w1"])


def test_a_run_goes_on_over_other_numbers_of_parts(tmp_path):
    batches = [models.batch(seed) for seed in range(6)]
    truth = models.Truth(models.params())
    for batch in batches:
        truth.step(batch)
    for steps, shape in enumerate(((1, 4), (4, 1), (2, 2)), 1):
        engine = tx.Engine(
            mesh=models.mesh(*shape), plan=plan(), optimizer=tx.optim.sgd(0.1, momentum=0.9)
        )
        with tx.Checkpoints(tmp_path, every=2) as checkpoints:
            state = engine.create_state(models.params(seed=steps - 1))
            state = engine.fit(
                models.train_step, state, batches, steps=2 * steps, checkpoints=checkpoints
            )
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5),
        *(models.host(state.stored_params), truth.p),
    )
