"""What tests of targets share."""

import jax
import jax.numpy as jnp
import pytest

import txcore as tx
from txcore.profiling.targets import parse_target


def available(name):
    """Return the target's name, or skip where its compiler is not installed."""
    try:
        assert parse_target(name).devices
    except ImportError as error:
        pytest.skip(str(error))
    return name


def audit_remote_exchange(shard, target):
    """Audit a step that exchanges 1,000 gradients by remote DMA on 8 devices of a target."""
    plan = tx.Plan(data_parallel=tx.DP("data", shard=shard, algorithm="remote_dma"))
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:1], axes=("data",)), plan=plan, optimizer=tx.optim.sgd(0.1)
    )

    @tx.step_fn
    def step(state, batch):
        def loss_of(params):
            return tx.example_mean(batch["x"] @ params["w"], axis="data")

        loss, grads = tx.value_and_grad(loss_of)(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    state = engine.create_state({"w": jnp.zeros(1000)})
    batch = {"x": jnp.zeros((1, 1000))}
    return engine.audit(step, state, batch, target=available(target), mesh={"data": 8})
