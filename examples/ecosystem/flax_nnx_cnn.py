"""A flax nnx CNN with batch statistics and dropout: python examples/ecosystem/flax_nnx_cnn.py."""

from typing import Any

import digits
import jax
import optax
from flax import nnx

import txcore as tx

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)  # before anything touches a device


class CNN(nnx.Module):
    """Two convolutions with batch normalisation; with `keys`, one for each image, it trains."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draw the parameters."""
        self.conv1 = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), use_bias=False, rngs=rngs)
        # axis_name: the statistics are those of the batches of all devices.
        self.norm1 = nnx.BatchNorm(16, momentum=0.9, axis_name="data", rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=0.9, axis_name="data", rngs=rngs)
        self.hidden = nnx.Linear(128, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Return the logits, (batch, 10)."""
        running = keys is None
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = nnx.relu(norm(conv(x), use_running_average=running))
            x = nnx.max_pool(x, (2, 2), (2, 2))
        x = nnx.relu(self.hidden(x.reshape(len(x), -1)))
        if keys is not None:
            x = jax.vmap(lambda row, key: self.dropout(row, rngs=key))(x, keys)
        return self.logits(x)


# The module's structure, what is trained, and the running statistics.
parts: Any = nnx.split(CNN(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
structure, params, stats = parts


@tx.step_fn
def train_step(state: tx.TrainState, batch: Any) -> Any:
    """Train on one batch; `state.extra` holds the running statistics."""
    keys = state.example_keys(batch)

    def loss_of(params: Any) -> Any:
        model = nnx.merge(structure, params, state.extra, copy=True)
        logits = model(batch["image"], keys)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), nnx.state(model, nnx.BatchStat)

    (loss, stats), grads = tx.value_and_grad(loss_of, has_aux=True)(state.params)
    grads, state = state.sync_gradients(grads)
    state = state.apply_gradients(grads=grads).replace(extra=stats)
    return state, {"loss": tx.pmean(loss, "data", name="loss")}


def eval_step(state: tx.TrainState, batch: Any) -> Any:
    """Measure the accuracy with the running statistics, without dropout."""
    model = nnx.merge(structure, state.params, state.extra)
    right = model(batch["image"]).argmax(-1) == batch["label"]
    return {"accuracy": tx.pmean(right.mean(), "data", name="accuracy")}


def create(devices: int) -> tx.TrainState:
    """Return an engine's first state (`state.engine` is the engine)."""
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:devices]),
        plan=tx.Plan(data_parallel=tx.DP(axis="data")),
        optimizer=tx.optim.sgd(0.05, momentum=0.9),
    )
    return engine.create_state(params, extra=stats)


if __name__ == "__main__":
    state = create(devices=4)
    for batch in digits.batches(steps=60):
        state, metrics = train_step(state, batch)
    engine: Any = state.engine
    accuracy = engine.evaluate(eval_step, state, [digits.test_batch()])["accuracy"]
    print(f"loss = {float(metrics['loss']):.3f}, accuracy on other digits = {accuracy:.1%}")
    print(engine.audit(train_step, state, batch))
