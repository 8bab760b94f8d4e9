"""The small GPT of examples/gpt_small in plain jax.numpy, and the same under an engine."""

import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

import txcore as tx

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "gpt_small"
ROWS, RATE = 16, 1e-3


def load_example(name):
    """Return a module of the example: MNIST's has the same names."""
    kept = {n: sys.modules.pop(n, None) for n in ("cli", "data", "model", "sample", "train")}
    sys.path.insert(0, str(EXAMPLE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLE))
        for other in kept:
            sys.modules.pop(other, None)
        sys.modules.update({n: module for n, module in kept.items() if module is not None})


model, train = load_example("model"), load_example("train")


def prepare_engine(layers):
    """Return (engine, step, state, batch) of the GPT on one device."""
    config = model.GPT(layers=layers)
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:1], axes=model.AXES, shape=(1,) * 4),
        plan=tx.Plan(
            data_parallel=tx.DP("data"),
            tensor_parallel=tx.TP("model", rules=config.tensor_rules),
            pipeline=tx.PP("pipe", microbatches=1),
            context="context",
        ),
        optimizer=tx.optim.adamw(RATE, weight_decay=0.0),
    )
    state = engine.create_state(model.init(config))
    return engine, train.make_steps(config)[0], state, make_batch(config)


def prepare_plain(layers):
    """Return the plain step, its arguments, and their specs."""
    config = model.GPT(layers=layers)
    params = model.init(config)
    moments = jax.tree.map(np.zeros_like, {"m": params, "v": params, "step": np.float32(0)})
    batch = make_batch(config)
    return train_step, (params, moments, batch), (P(), P(), P("data"))


def make_batch(config):
    tokens = np.zeros((ROWS, config.length), np.int32)
    return {"tokens": tokens, "labels": tokens}


def loss_of(params, batch):
    """Return the mean loss; the layers one after the other."""
    config = model.GPT()
    rows, length = batch["tokens"].shape
    half = config.features // 2
    angles = jnp.arange(length)[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]

    def rotate(x):
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    x = params["embedding"][batch["tokens"]]
    for i in range(len(params["blocks"]["norm1"])):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        made = model.normalise(x, own["norm1"]) @ own["qkv"]
        made = made.reshape(rows, length, config.heads, 3, config.features)
        q, k, v = made[..., 0, :], made[..., 1, :], made[..., 2, :]
        out = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + out.reshape(rows, length, -1) @ own["out"]
        x = x + jax.nn.gelu(model.normalise(x, own["norm2"]) @ own["up"]) @ own["down"]
    logits = model.normalise(x, params["norm"]) @ params["head"]
    chosen = jnp.take_along_axis(logits, batch["labels"][..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)


def train_step(params, moments, batch):
    """Descend by AdamW without decay."""
    loss, grads = jax.value_and_grad(loss_of)(params, batch)
    grads = lax.pmean(grads, "data")
    step = moments["step"] + 1
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments["m"], grads)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, moments["v"], grads)
    rate = RATE * jnp.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    params = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), params, m, v)
    return params, {"m": m, "v": v, "step": step}, lax.pmean(loss, "data")
