"""A linen CNN with batch statistics and dropout: python examples/ecosystem/flax_linen_cnn.py."""

from typing import Any

import digits
import flax.linen as nn
import jax
import optax

import txcore as tx

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)  # before anything touches a device


class CNN(nn.Module):
    """Two convolutions with batch normalisation; with `keys`, one for each image, it trains."""

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Return the logits, (batch, 10)."""
        train = keys is not None
        for channels in (16, 32):
            x = nn.Conv(channels, (3, 3), use_bias=False)(x)
            # axis_name: the statistics are those of the batches of all devices.
            x = nn.BatchNorm(not train, momentum=0.9, axis_name="data" if train else None)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        if train:
            dropout = nn.Dropout(0.5, deterministic=False)
            x = jax.vmap(lambda row, key: dropout(row, rng=key))(x, keys)
        return nn.Dense(10)(x)


model = CNN()


@tx.step_fn
def train_step(state: tx.TrainState, batch: Any) -> Any:
    """Train on one batch; `state.extra` holds the running statistics."""
    keys = state.example_keys(batch)

    def loss_of(params: Any) -> Any:
        variables = {"params": params, "batch_stats": state.extra}
        logits, new = model.apply(variables, batch["image"], keys, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), new["batch_stats"]

    (loss, stats), grads = tx.value_and_grad(loss_of, has_aux=True)(state.params)
    grads, state = state.sync_gradients(grads)
    state = state.apply_gradients(grads=grads).replace(extra=stats)
    return state, {"loss": tx.pmean(loss, "data", name="loss")}


def eval_step(state: tx.TrainState, batch: Any) -> Any:
    """Measure the accuracy with the running statistics, without dropout."""
    variables = {"params": state.params, "batch_stats": state.extra}
    logits: Any = model.apply(variables, batch["image"])
    right = logits.argmax(-1) == batch["label"]
    return {"accuracy": tx.pmean(right.mean(), "data", name="accuracy")}


def create(devices: int) -> tx.TrainState:
    """Return an engine's first state (`state.engine` is the engine)."""
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:devices]),
        plan=tx.Plan(data_parallel=tx.DP(axis="data")),
        optimizer=tx.optim.sgd(0.05, momentum=0.9),
    )
    variables = model.init(jax.random.key(0), digits.test_batch()["image"])
    return engine.create_state(variables["params"], extra=variables["batch_stats"])


if __name__ == "__main__":
    state = create(devices=4)
    for batch in digits.batches(steps=60):
        state, metrics = train_step(state, batch)
    engine: Any = state.engine
    accuracy = engine.evaluate(eval_step, state, [digits.test_batch()])["accuracy"]
    print(f"loss = {float(metrics['loss']):.3f}, accuracy on other digits = {accuracy:.1%}")
    print(engine.audit(train_step, state, batch))
