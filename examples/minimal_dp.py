"""Data parallelism in ten lines: python examples/minimal_dp.py."""

from typing import Any

import jax
import numpy as np

import txcore as tx

jax.config.update("jax_num_cpu_devices", 4)
engine = tx.Engine(
    mesh=tx.MeshSpec(axes=("data",)),
    plan=tx.Plan(data_parallel=tx.DP(axis="data")),
    optimizer=tx.optim.sgd(0.1),
)


@tx.step_fn
def train_step(state: tx.TrainState, batch: Any) -> Any:
    """Fit y = 3 x by least squares; the two pmeans are all that is sent."""
    loss, grads = tx.value_and_grad(lambda w: ((w * batch["x"] - batch["y"]) ** 2).mean())(
        state.params
    )
    grads = tx.pmean(grads, "data", name="grads")
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}


x = np.linspace(-1, 1, 64, dtype=np.float32)
state = engine.create_state(np.float32(0))
for _ in range(20):
    state, metrics = train_step(state, {"x": x, "y": 3 * x})
print(f"w = {float(state.params):.3f}, loss = {float(metrics['loss']):.2e}")
print(engine.audit(train_step, state, {"x": x, "y": 3 * x}))
