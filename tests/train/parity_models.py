"""Three small models as people write them, and steps of which a part may be replaced."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import txcore as tx
from txcore import kernels

# The optimizers that go with them: Adam makes whole steps of gradients that are nearly 0.
MODELS = {
    "cnn": tx.optim.adamw(1e-3),
    "mlp": tx.optim.adamw(1e-3),
    "plain": tx.optim.sgd(0.1, momentum=0.9),
}


def params(model, seed):
    rng = np.random.default_rng(seed)
    # He et al., 2015
    shapes = {"w0": (3, 3, 1, 8), "w1": (3, 3, 8, 8), "w2": (32, 10)}
    if model == "mlp":
        shapes = {"w0": (64, 48), "w1": (48, 48), "w2": (48, 10)}
    made = {
        name: rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    return made | {f"b{i}": np.zeros(made[f"w{i}"].shape[-1], np.float32) for i in range(3)}


def extra(model):
    size = 48 if model == "mlp" else 8
    return {f"mean{i}": np.zeros(size, np.float32) for i in range(2)} if model != "plain" else None


def batches(seed, count=3, size=32):
    data = load_digits()
    rng = np.random.default_rng(seed)
    for i in range(count):
        chosen = rng.integers(len(data.images), size=size)
        images = (data.images[chosen, ..., None] / 16).astype(np.float32)
        mask = np.arange(size) < size - 5 * (i == count - 1)
        yield {"x": images, "y": data.target[chosen], "mask": mask.astype(np.float32)}


def forward(model, params, old, batch, *, moments=tx.batch_moments):
    """Return the logits and the new running means; the bias before a normalisation does nothing."""
    x, new = batch["x"], {}
    x = x.reshape(len(x), -1) if model == "mlp" else x
    for i in range(2):
        w, b = params[f"w{i}"], params[f"b{i}"]
        x = kernels.dense(x, w, b) if model == "mlp" else kernels.conv2d(x, w, b)
        if model != "plain":
            mean, var = moments(x, "data", mask=batch["mask"])
            new[f"mean{i}"] = 0.9 * old[f"mean{i}"] + 0.1 * mean
            x = (x - mean) / jnp.sqrt(var + 1e-5)
        x = jax.nn.relu(x)
        if model != "mlp":
            n, side, _, c = x.shape
            x = x.reshape(n, side // 2, 2, side // 2, 2, c).max((2, 4))
    logits = x.reshape(len(x), -1) @ params["w2"] + params["b2"]
    return logits, (new if model != "plain" else None)


def mean_loss(logits, batch):
    losses = -jax.nn.log_softmax(logits)[jnp.arange(len(logits)), batch["y"]]
    return tx.example_mean(losses, batch["mask"], axis="data")


def reduced(grads):
    return tx.pmean(grads, "data")


def make_step(model, reduce=reduced, *, loss=mean_loss, moments=tx.batch_moments, report=reduced):
    """The right step, or one with a part replaced."""

    @tx.step_fn
    def step(state, batch):
        def loss_of(params):
            logits, new = forward(model, params, state.extra, batch, moments=moments)
            return loss(logits, batch), (new, logits)

        (value, (new, logits)), grads = tx.value_and_grad(loss_of, has_aux=True)(state.params)
        state = state.replace(extra=new).apply_gradients(grads=reduce(grads))
        right = (logits.argmax(-1) == batch["y"]).astype(jnp.float32)
        accuracy = tx.pmean(tx.example_mean(right, batch["mask"], axis="data"), "data")
        return state, {"loss": report(value), "accuracy": accuracy}

    return step


def engines(model, counts=(1, 4), optimizer=None):
    return tuple(
        tx.Engine(
            mesh=tx.MeshSpec(jax.devices()[:n]),
            plan=tx.Plan(data_parallel=tx.DP("data")),
            optimizer=optimizer or MODELS[model],
        )
        for n in counts
    )
