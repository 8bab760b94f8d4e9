"""Layers on two devices, the batch in microbatches: python examples/pipeline_two_stage.py.

The first stage begins with an embedding, the last one ends with a loss. One step runs under every
plan: on one device, and on two stages by several schedules, with the same loss curve.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import txcore as tx

jax.config.update("jax_num_cpu_devices", 2)
WORDS, WIDTH, LAYERS, ROWS = 64, 128, 8, 128
rng = np.random.default_rng(0)
params = {
    "embed": rng.normal(size=(WORDS, WIDTH)).astype(np.float32),
    "head": np.zeros((WIDTH, WORDS), np.float32),
    "blocks": {
        "up": rng.normal(0, WIDTH**-0.5, (LAYERS, WIDTH, WIDTH)).astype(np.float32),
        "down": rng.normal(0, 0.5 * WIDTH**-0.5, (LAYERS, WIDTH, WIDTH)).astype(np.float32),
    },
}
word = rng.integers(0, WORDS, ROWS)
batch = {"word": word, "next": (5 * word + 3) % WORDS}


def first(params: Any, batch: Any) -> jax.Array:
    """Begin on the first stage: look words up."""
    return params["embed"][batch["word"]]


def block(params: Any, x: jax.Array, batch: Any, stage: jax.Array) -> jax.Array:
    """Run the layers that a stage has."""
    for up, down in zip(params["up"], params["down"], strict=True):
        x = x + jnp.tanh(x @ up) @ down
    return x


def last(params: Any, x: jax.Array, batch: Any) -> jax.Array:
    """End on the last stage: the loss of each example."""
    log_p = jax.nn.log_softmax(x @ params["head"])
    return -jnp.take_along_axis(log_p, batch["next"][:, None], 1)[:, 0]


@tx.step_fn
def train_step(state: tx.TrainState, batch: Any) -> Any:
    """Differentiate by the plan's schedule, or on one device; reduce; update."""
    loss, grads = tx.pipeline.value_and_grad(first, block, last)(state.params, batch)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": loss}


PLANS = [
    tx.Plan(),
    tx.Plan(pipeline=tx.PP("pipe", microbatches=4, schedule="gpipe")),
    tx.Plan(pipeline=tx.PP("pipe", microbatches=4)),
    tx.Plan(pipeline=tx.PP("pipe", microbatches=4, schedule="interleaved", chunks=2)),
    tx.Plan(pipeline=tx.PP("pipe", microbatches=4, schedule="zb-h1")),
]
for plan in PLANS:
    stages = 1 if plan.pipeline is None else 2
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:stages], axes=("pipe",)),
        plan=plan,
        optimizer=tx.optim.adamw(0.0005, clip_norm=1.0),
    )
    state = engine.create_state(params)
    report = engine.audit(train_step, state, batch)
    for _ in range(5):
        state, metrics = train_step(state, batch)
    print(plan.pipeline.make_schedule(stages) if plan.pipeline else "one device")
    print(f"  loss {float(metrics['loss']):.5f} after 5 steps; {report.verdict()}\n")
