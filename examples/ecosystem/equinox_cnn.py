"""An equinox CNN with batch statistics and dropout: python examples/ecosystem/equinox_cnn.py."""

from typing import Any

import digits
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import txcore as tx

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)  # before anything touches a device

Stats = tuple[jax.Array, jax.Array]


class BatchNorm(eqx.Module):
    """Batch normalisation over the batches of all devices.

    eqx.nn.BatchNorm reduces over a vmap's axis, which jax does not take inside of a shard_map.
    """

    scale: jax.Array
    shift: jax.Array

    def __init__(self, channels: int) -> None:
        """Start with the identity."""
        self.scale, self.shift = jnp.ones(channels), jnp.zeros(channels)

    def __call__(self, x: jax.Array, running: Stats, train: bool) -> tuple[jax.Array, Stats]:
        """Normalise x, (batch, channels, height, width); return it and the running statistics."""
        mean, var = running
        if train:
            moments = tx.batch_moments(x, "data", dims=(0, 2, 3), shift=mean, name="norm")
            mean, var = tx.vary(moments, "data", name="norm")
            running = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, running, moments)
        scale = self.scale * jax.lax.rsqrt(var + 1e-5)
        return (x - mean[:, None, None]) * scale[:, None, None] + self.shift[:, None, None], running


class CNN(eqx.Module):
    """Two convolutions with batch normalisation; with `keys`, one for each image, it trains."""

    convs: list[eqx.nn.Conv2d]
    norms: list[BatchNorm]
    hidden: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    logits: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        """Draw the parameters."""
        keys = jax.random.split(key, 4)
        sizes = ((1, 16), (16, 32))
        self.convs = [
            eqx.nn.Conv2d(a, b, 3, padding=1, use_bias=False, key=k)
            for (a, b), k in zip(sizes, keys[:2], strict=True)
        ]
        self.norms = [BatchNorm(channels) for _, channels in sizes]
        self.hidden = eqx.nn.Linear(128, 64, key=keys[2])
        self.dropout = eqx.nn.Dropout(0.5)
        self.logits = eqx.nn.Linear(64, 10, key=keys[3])

    def __call__(
        self, x: jax.Array, stats: list[Stats], keys: jax.Array | None = None
    ) -> tuple[jax.Array, list[Stats]]:
        """Return the logits, (batch, 10), and the running statistics."""
        x, new = jnp.moveaxis(x, -1, 1), []
        for conv, norm, running in zip(self.convs, self.norms, stats, strict=True):
            x, running = norm(jax.vmap(conv)(x), running, train=keys is not None)
            n, c, side, _ = x.shape
            x = jax.nn.relu(x).reshape(n, c, side // 2, 2, side // 2, 2).max((3, 5))
            new.append(running)
        x = jax.nn.relu(jax.vmap(self.hidden)(x.reshape(len(x), -1)))
        if keys is not None:
            x = jax.vmap(lambda row, key: self.dropout(row, key=key))(x, keys)
        return jax.vmap(self.logits)(x), new


# What is trained, and the rest of the module.
params, static = eqx.partition(CNN(jax.random.key(0)), eqx.is_inexact_array)
stats = [(jnp.zeros(channels), jnp.ones(channels)) for channels in (16, 32)]


@tx.step_fn
def train_step(state: tx.TrainState, batch: Any) -> Any:
    """Train on one batch; `state.extra` holds the running statistics."""
    keys = state.example_keys(batch)

    def loss_of(params: Any) -> Any:
        logits, stats = eqx.combine(params, static)(batch["image"], state.extra, keys)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), stats

    (loss, stats), grads = tx.value_and_grad(loss_of, has_aux=True)(state.params)
    grads, state = state.sync_gradients(grads)
    state = state.apply_gradients(grads=grads).replace(extra=stats)
    return state, {"loss": tx.pmean(loss, "data", name="loss")}


def eval_step(state: tx.TrainState, batch: Any) -> Any:
    """Measure the accuracy with the running statistics, without dropout."""
    logits, _ = eqx.combine(state.params, static)(batch["image"], state.extra)
    right = logits.argmax(-1) == batch["label"]
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
