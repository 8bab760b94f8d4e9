"""One MLP whose layers are split over devices: python examples/tensor_parallel_mlp.py.

Each pair of layers is split by columns, then by rows, with one sum each way (Megatron-LM). The same
step runs on every mesh: the same loss, in less memory a device, and the proof of what is sent.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import txcore as tx

jax.config.update("jax_num_cpu_devices", 4)
WIDTH, INNER, PAIRS = 64, 256, 3
rng = np.random.default_rng(0)
params = [
    {
        "up": rng.normal(size=(WIDTH, INNER), scale=WIDTH**-0.5).astype(np.float32),
        "bias": np.zeros(INNER, np.float32),
        "down": rng.normal(size=(INNER, WIDTH), scale=INNER**-0.5).astype(np.float32),
    }
    for _ in range(PAIRS)
]
x = rng.normal(size=(64, WIDTH)).astype(np.float32)
batch = {"x": x, "y": np.roll(x, 1, axis=1)}


def loss_of(params: Any, batch: Any) -> jax.Array:
    """Compute with this device's part of each pair."""
    x = batch["x"]
    for p in params:
        inner = jnp.tanh(tx.tensor.column_dense(x, p["up"], p["bias"], axis="model"))
        x = x + tx.tensor.row_dense(inner, p["down"], axis="model")
    return tx.example_mean(jnp.mean((x - batch["y"]) ** 2, -1), axis="data")


@tx.step_fn
def train_step(state: tx.TrainState, batch: Any) -> Any:
    """Differentiate, reduce as the plan says, update."""
    loss, grads = tx.value_and_grad(loss_of)(state.params, batch)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}


# Dims count from the end; what no rule names is whole on every device.
plan = tx.Plan(
    data_parallel=tx.DP("data"),
    tensor_parallel=tx.TP("model", rules={"*/up": -1, "*/bias": -1, "*/down": -2}),
)
optimizer = tx.optim.adamw(0.003, clip_norm=1.0)
for data, model in ((4, 1), (2, 2), (1, 4)):
    mesh = tx.MeshSpec(axes=("data", "model"), shape=(data, model))
    described = plan.describe(params, mesh, optimizer=optimizer)
    if data == model:
        print(described, end="\n\n")
    engine = tx.Engine(mesh=mesh, plan=plan, optimizer=optimizer)
    state = engine.create_state(params)
    report = engine.audit(train_step, state, batch)
    for _ in range(20):
        state, metrics = train_step(state, batch)
    held = described.memory["parameters"] / 1e3
    print(f"data={data}, model={model}: loss {float(metrics['loss']):.4f}; a device holds")
    print(f"  {held:.0f} kB of parameters; {report.verdict()}")
