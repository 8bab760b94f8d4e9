"""One MLP with plain data parallelism and with sharded state: python examples/zero_mlp.py.

The same loss curve, in less memory a device, and the proof of what that costs on the wire.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import txcore as tx

jax.config.update("jax_num_cpu_devices", 4)
WIDTH, DEPTH = 256, 6
rng = np.random.default_rng(0)
params = [
    {
        "w": rng.normal(size=(WIDTH, WIDTH), scale=WIDTH**-0.5).astype(np.float32),
        "b": np.zeros(WIDTH, np.float32),
    }
    for _ in range(DEPTH)
]
x = rng.normal(size=(64, WIDTH)).astype(np.float32)
batch = {"x": x, "y": np.roll(x, 1, axis=1)}


def layer(params: Any, x: jax.Array) -> jax.Array:
    """Compute one layer from its whole parameters."""
    return x + jnp.tanh(x @ params["w"] + params["b"])


def loss_of(shards: Any, batch: Any) -> jax.Array:
    """Gather a layer at a time, and the next one meanwhile; under other plans nothing."""
    out = tx.zero.layers(layer, shards, batch["x"])
    return tx.example_mean(jnp.mean((out - batch["y"]) ** 2, -1), axis="data")


@tx.step_fn
def train_step(state: tx.TrainState, batch: Any) -> Any:
    """Differentiate, reduce as the plan says, update."""
    loss, grads = tx.value_and_grad(loss_of)(state.shards, batch)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}


def bytes_of_a_device(tree: Any) -> int:
    """Count what one device holds of a tree."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


for shard in (None, "optimizer", "gradients", "parameters"):
    engine = tx.Engine(
        mesh=tx.MeshSpec(axes=("data",)),
        plan=tx.Plan(data_parallel=tx.DP("data", shard=shard)),
        optimizer=tx.optim.adamw(0.003, clip_norm=1.0),
    )
    state = engine.create_state(params)
    report = engine.audit(train_step, state, batch)
    held = [bytes_of_a_device(tree) / 1e6 for tree in (state.stored_params, state.opt_state)]
    for _ in range(20):
        state, metrics = train_step(state, batch)
    print(f"shard={shard}: loss {float(metrics['loss']):.5f}; a device holds {held[0]:.2f} MB of")
    print(f"  parameters and {held[1]:.2f} MB of moments; {report.verdict()}")
