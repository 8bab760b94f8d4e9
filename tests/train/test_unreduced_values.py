"""Values that jax types as unreduced, in a step: reduced by tx.pmean, else refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import txcore as tx

BATCH = np.arange(24, dtype=np.float32).reshape(8, 3)


def unreduced(tree):
    return jax.tree.map(lambda x: lax.pcast(x, "data", to="unreduced"), tree)


def run(reduce_grads, report_loss):
    @tx.step_fn
    def step(state, batch):
        loss, grads = tx.value_and_grad(lambda p: jnp.mean(batch @ p["w"]))(state.params)
        state = state.apply_gradients(grads=reduce_grads(unreduced(grads)))
        return state, {"loss": report_loss(unreduced(loss))}

    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:4]),
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.sgd(0.1),
    )
    state, metrics = step(engine.create_state({"w": np.ones(3, np.float32)}), BATCH)
    return np.asarray(state.stored_params["w"]), float(metrics["loss"])


def mean(x):
    return tx.pmean(x, "data")


def test_their_mean_is_that_of_local_values():
    w, loss = run(mean, mean)
    np.testing.assert_allclose(w, 1 - 0.1 * BATCH.mean(0), atol=1e-6)
    assert loss == pytest.approx(BATCH.sum(1).mean())


def test_an_unreduced_gradient_was_never_reduced():
    with pytest.raises(ValueError, match=r"gradient of params\['w'\] varies along axis 'data', so"):
        run(lambda grads: grads, mean)


def test_an_unreduced_metric_is_one_devices():
    with pytest.raises(ValueError, match=r"metrics\['loss'\] varies along axis 'data': it is one"):
        run(mean, lambda loss: loss)
