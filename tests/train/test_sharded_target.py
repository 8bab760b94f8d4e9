"""Sharded state on machines that are not here: exact, and as the plan predicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from target_cases import available

import txcore as tx

AXES = ("replica", "data")
WIDTH, DEPTH = 512, 3
TARGETS = {"cpu:8": 8, "cuda:h100:8x8": 64, "tpu:v5e:16x16": 256}


def block(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def loss_of(shards, b):
    x = tx.zero.layers(block, shards, b["x"])
    return tx.example_mean(jnp.sum(x * x, -1), axis=AXES)


@tx.step_fn
def train_step(state, b):
    loss, grads = tx.value_and_grad(loss_of)(state.shards, b)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, AXES, name="loss")}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "shard, axis", [("optimizer", None), ("parameters", None), ("parameters", "data")]
)
def test_the_audit_is_exact_and_as_predicted(target, shard, axis):
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:1], AXES, (1, 1)),
        plan=tx.Plan(data_parallel=tx.DP(AXES, shard=shard, shard_axis=axis)),
        optimizer=tx.optim.adamw(0.1, clip_norm=1.0),
        on_nonfinite="skip",
    )
    layer = {"w": np.zeros((WIDTH, WIDTH), np.float32), "b": np.zeros(WIDTH, np.float32)}
    state = engine.create_state([layer] * DEPTH)
    sizes = {"replica": 2 if axis else 1, "data": TARGETS[target] // (2 if axis else 1)}
    report = engine.audit(
        train_step,
        state,
        {"x": np.zeros((4, WIDTH), np.float32)},
        target=available(target),
        mesh=sizes,
    )
    assert report.exact, report
    whole = 4 * DEPTH * (WIDTH * WIDTH + WIDTH)
    wanted = {("gradients", "reduce-scatter"): whole, ("parameters", "all-gather"): whole}
    if axis:
        wanted["gradients", "all-reduce"] = whole // sizes["data"]
    if shard == "parameters":  # all weights but the first layer's
        wanted["parameters again", "all-gather"] = 4 * (DEPTH - 1) * WIDTH * WIDTH
    wanted["gradient norm", "all-reduce"] = wanted["finite gradients", "all-reduce"] = 4
    wanted["pmean/loss", "all-reduce"] = 4
    assert {(n.what, n.kind): n.found_bytes for n in report.plan} == wanted
    assert all(n.found_bytes == n.payload_bytes for n in report.plan[:2])
