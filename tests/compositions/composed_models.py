"""Models that run under any composition of plans: written once, every layer names its axis.

`fault` plants a mistake that people make into the one place where they make it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import txcore as tx

AXES = ("data", "context", "pipe", "model")
WORDS, LENGTH, WIDTH, HEADS, ROWS = 32, 16, 16, 8, 16
record = tx.testing.record


@dataclass(frozen=True)
class Model:
    """A model as a pipeline's functions, its parameters and its data.

    Attributes:
      functions: `first`, `block` and `last`.
      params: layers stacked in "blocks".
      rules: of tensor parallelism.
      make_batch: `make_batch(seed)`, a global batch in its own order.
      sequence: the keys of the batch whose dim 1 is a sequence.
    """

    functions: tuple[Any, Any, Any]
    params: Any
    rules: dict[str, int]
    make_batch: Any
    sequence: tuple[str, ...] = ()


def normal(rng, *shape):
    return (rng.standard_normal(shape) / np.sqrt(shape[-2])).astype(np.float32)


# --- GPT ------------------------------------------------------------------------------------------


def make_gpt(layers=4, fault=""):
    rng = np.random.default_rng(0)
    params = {
        "embedding": 0.3 * normal(rng, WORDS, WIDTH),
        "blocks": {
            "scale": np.ones((layers, WIDTH), np.float32),
            "qkv": normal(rng, layers, WIDTH, HEADS, 3 * WIDTH // HEADS).reshape(
                layers, WIDTH, 3 * WIDTH
            ),
            "out": normal(rng, layers, WIDTH, WIDTH),
            "up": normal(rng, layers, WIDTH, 2 * WIDTH),
            "down": normal(rng, layers, 2 * WIDTH, WIDTH),
            "bias": 0.1 * rng.standard_normal((layers, WIDTH)).astype(np.float32),
        },
    }
    rules = {"embedding": -2, "blocks/qkv": -1, "blocks/out": -2}
    rules |= {"blocks/up": -1, "blocks/down": -2}
    functions = (
        lambda params, batch: embed(params, batch, fault),
        lambda params, x, batch, stage: run_layers(params, x, batch, stage, fault),
        lambda params, x, batch: score(params, x, batch, fault),
    )
    return Model(functions, params, rules, make_text, ("tokens", "labels"))


def make_text(seed):
    rng = np.random.default_rng(seed)
    text = rng.integers(0, WORDS, (ROWS, LENGTH + 1)).astype(np.int32)
    mask = (rng.random(ROWS) < 0.8).astype(np.float32)
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "mask": np.maximum(mask, seed == 0)}


def embed(params, batch, fault):
    table = params["embedding"]
    if fault == "gradient of the tied embedding counted once":
        table = jax.lax.stop_gradient(table)
    x = tx.tensor.embedding(batch["tokens"], table, axis="model")
    return record(x, "embedding", P(None, "context"))


def run_layers(params, x, batch, stage, fault):
    return over_layers(lambda layer, x: run_layer(layer, x, fault), params, x)


def over_layers(run, params, x):
    """Run stacked layers: one is written out, as ZB-H1 needs it, several are one loop."""
    if jax.tree.leaves(params)[0].shape[0] == 1:
        return run(jax.tree.map(lambda w: w[0], params), x)
    return jax.lax.scan(lambda x, layer: (run(layer, x), None), x, params)[0]


def run_layer(layer, x, fault):
    h = normalise(x) * layer["scale"]
    qkv = tx.tensor.column_dense(h, layer["qkv"], axis="model", name="qkv")
    qkv = qkv.reshape(*x.shape[:2], -1, 3, WIDTH // HEADS)
    q, k, v = (qkv[..., i, :] for i in range(3))
    places = tx.context.positions("context", x.shape[1])
    if fault == "wrong rotary offset of a sequence shard":
        places = jnp.arange(x.shape[1]) + 0 * places
    out = tx.context.ring_attention(rotate(q, places), rotate(k, places), v, axis="context")
    out = record(out, "attention", P(None, "context", "model"))
    out = out.reshape(*x.shape[:2], -1)
    x = x + (
        out @ layer["out"]
        if fault == "missing all-reduce"
        else tx.tensor.row_dense(out, layer["out"], axis="model", name="out")
    )
    x = record(x, "residual", P(None, "context"))
    up = layer["up"]
    if fault == "wrong shard":
        up = tx.shift(up, "model", 1)
    inner = jax.nn.gelu(tx.tensor.column_dense(x, up, axis="model", name="up"))
    inner = record(inner, "inner", P(None, "context", "model"))
    if fault == "bias added on each device before the row sum":
        part = inner @ layer["down"] + layer["bias"]
        x = x + tx.tensor.leave(part, "model", name="down")
    elif fault == "mean for sum":
        x = x + tx.pmean(inner @ layer["down"], "model") + layer["bias"]
    else:
        x = x + tx.tensor.row_dense(inner, layer["down"], layer["bias"], axis="model", name="down")
    return record(x, "feed-forward", P(None, "context"))


def normalise(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def rotate(x, places):
    half = x.shape[-1] // 2 or 1
    angles = (places[:, None] * 0.5 ** jnp.arange(half))[:, None].astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    if not b.shape[-1]:
        return a * jnp.cos(angles)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def score(params, x, batch, fault):
    logits = tx.tensor.column_dense(normalise(x), params["embedding"].T, axis="model", name="head")
    logits = record(logits, "logits", P(None, "context", "model"))
    losses = tx.tensor.cross_entropy(logits, batch["labels"], axis="model")
    return jnp.mean(record(losses, "losses", P(None, "context")), 1)


# --- MLP ------------------------------------------------------------------------------------------


def make_mlp(layers=8, fault=""):
    rng = np.random.default_rng(1)
    params = {
        "in": normal(rng, 6, WIDTH),
        "blocks": {
            "up": normal(rng, layers, WIDTH, 2 * WIDTH),
            "b": 0.1 * rng.standard_normal((layers, 2 * WIDTH)).astype(np.float32),
            "down": 0.5 * normal(rng, layers, 2 * WIDTH, WIDTH),
        },
        "head": normal(rng, WIDTH, 8),
    }

    def first(params, batch):
        x = batch["x"] @ params["in"]
        if "key" not in batch:
            return x
        keys = jax.random.wrap_key_data(batch["key"])
        if fault == "dropout key equal on all shards":
            keys = jax.random.split(jax.random.key(0), ROWS)[: len(x)]
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, x.shape[1:]))(keys)
        return record(jnp.where(kept, x, 0), "dropout")

    def block(params, x, batch, stage):
        return over_layers(run, params, x)

    def run(layer, x):
        if fault == "missing all-reduce of the backward pass":
            part = jnp.tanh(x @ layer["up"] + layer["b"]) @ layer["down"]
            return record(x + tx.tensor.leave(part, "model"), "layer")
        inner = jnp.tanh(tx.tensor.column_dense(x, layer["up"], layer["b"], axis="model"))
        x = x + tx.tensor.row_dense(inner, layer["down"], axis="model")
        return record(x, "layer")

    def last(params, x, batch):
        logits = tx.tensor.column_dense(x, params["head"], axis="model")
        return tx.tensor.cross_entropy(logits, batch["y"], axis="model")

    def make_batch(seed):
        rng = np.random.default_rng(seed)
        mask = np.maximum((rng.random(ROWS) < 0.8).astype(np.float32), seed == 0)
        x = rng.standard_normal((ROWS, 6)).astype(np.float32)
        return {"x": x, "y": rng.integers(0, 8, ROWS).astype(np.int32), "mask": mask}

    rules = {"blocks/up": -1, "blocks/b": -1, "blocks/down": -2, "head": -1}
    return Model((first, block, last), params, rules, make_batch)


# --- CNN ------------------------------------------------------------------------------------------


def make_cnn(layers=0):
    """A CNN by channels: of the first convolution columns, of the second rows; no pipeline."""
    rng = np.random.default_rng(2)
    params = {
        "conv1": 0.5 * rng.standard_normal((3, 3, 1, 8)).astype(np.float32),
        "b1": 0.1 * rng.standard_normal(8).astype(np.float32),
        "conv2": 0.2 * rng.standard_normal((3, 3, 8, 8)).astype(np.float32),
        "b2": 0.1 * rng.standard_normal(8).astype(np.float32),
        "head": normal(rng, 32, 8),
    }

    def convolve(x, w):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=dims)

    def losses_of(params, batch):
        x = batch["x"].astype(params["conv1"].dtype)  # a convolution promotes nothing
        x = tx.tensor.enter(x, "model", name="conv1")
        x = jnp.tanh(convolve(x, params["conv1"]) + params["b1"])
        x = record(x, "columns", P(None, None, None, "model"))
        x = tx.tensor.leave(convolve(x, params["conv2"]), "model", name="conv2") + params["b2"]
        x = record(jnp.tanh(x), "rows").reshape(x.shape[0], -1)
        logits = tx.tensor.column_dense(x, params["head"], axis="model")
        return tx.tensor.cross_entropy(logits, batch["y"], axis="model")

    def make_batch(seed):
        rng = np.random.default_rng(seed)
        mask = np.maximum((rng.random(ROWS) < 0.8).astype(np.float32), seed == 0)
        x = rng.standard_normal((ROWS, 8, 8, 1)).astype(np.float32)
        return {"x": x, "y": rng.integers(0, 8, ROWS).astype(np.int32), "mask": mask}

    rules = {"conv1": -1, "b1": -1, "conv2": -2, "head": -1}
    return Model((losses_of,), params, rules, make_batch)


MODELS = {"mlp": make_mlp, "cnn": make_cnn, "gpt": make_gpt}
