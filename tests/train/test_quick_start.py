"""Titanax's quick start as written but for the import, and DESIGN's on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import txcore as tx

PARAMS = {"w": np.ones((3, 1), np.float32), "b": np.zeros(1, np.float32)}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 3)).astype(np.float32)
BATCH = {"x": X, "y": X @ np.float32([[1], [-2], [3]])}


def loss_of(params, batch):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def test_titanax_quick_start_on_one_device(capsys):
    mesh = tx.MeshSpec(devices=[jax.devices("cpu")[0]], axes=("data",))
    plan = tx.Plan(data_parallel=tx.DP(axis="data"))
    engine = tx.Engine(
        mesh=mesh, plan=plan, optimizer=tx.optim.sgd(0.01), loggers=[tx.loggers.Basic()]
    )

    @tx.step_fn
    def train_step(state, batch):
        loss, grads = jax.value_and_grad(loss_of)(state.params, batch)
        return state.apply_gradients(grads=grads), {"loss": loss}

    state = engine.create_state(PARAMS)
    state = engine.fit(train_step, state, [BATCH], steps=100)
    grads = jax.grad(loss_of)(PARAMS, BATCH)
    state2, _ = train_step(engine.create_state(PARAMS), BATCH)
    np.testing.assert_allclose(state2.params["w"], PARAMS["w"] - 0.01 * grads["w"], rtol=1e-5)
    assert loss_of(state.params, BATCH) < loss_of(PARAMS, BATCH) / 2
    assert "100/100  100.0%  loss" in capsys.readouterr().out
    assert engine.audit(train_step, state, BATCH).collectives == ()


@pytest.mark.parametrize("value_and_grad", [tx.value_and_grad, jax.value_and_grad])
@pytest.mark.parametrize("n", [1, 2, 8])
def test_design_quick_start(n, value_and_grad):
    mesh = tx.MeshSpec(devices=jax.devices("cpu")[:n], axes=("data",))
    plan = tx.Plan(data_parallel=tx.DP(axis="data"))
    engine = tx.Engine(mesh=mesh, plan=plan, optimizer=tx.optim.sgd(0.01))

    @tx.step_fn
    def train_step(state, batch):
        loss, grads = value_and_grad(lambda p: loss_of(p, batch))(state.params)
        grads = tx.pmean(grads, "data")
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    state = engine.create_state(PARAMS)
    state, metrics = train_step(state, BATCH)
    grads = jax.grad(loss_of)(PARAMS, BATCH)
    np.testing.assert_allclose(metrics["loss"], loss_of(PARAMS, BATCH), rtol=1e-5)
    for key in PARAMS:
        np.testing.assert_allclose(
            state.params[key], PARAMS[key] - 0.01 * grads[key], rtol=1e-5, atol=1e-7
        )
    state = engine.fit(train_step, state, [BATCH], steps=20)
    report = engine.audit(train_step, state, BATCH)
    assert report.ok
    assert len(report.collectives) == (0 if n == 1 else 1)
    assert report.payload_bytes == (0 if n == 1 else 4 * (3 + 1 + 1))
