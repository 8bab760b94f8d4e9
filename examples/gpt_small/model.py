"""A small GPT: causal attention, written once for any split of heads, sequence, layers and batch.

Every layer names its axis; along one of a single device nothing is sent. The functions are those of
a pipeline: `first` embeds, `block` runs some layers, and `last` returns the losses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import txcore as tx

Function = Callable[..., Any]

AXES = ("data", "context", "pipe", "model")
DATA_AXES = ("data", "context")  # over which losses and gradients are averaged

# Of the dims that are split over "model", from the end: columns, rows, and the vocabulary.
TENSOR_RULES = {"blocks/qkv": -1, "blocks/up": -1, "blocks/out": -2, "blocks/down": -2}


@dataclass(frozen=True)
class GPT:
    """What a model consists of.

    Attributes:
      vocabulary: tokens.
      length: of a sequence.
      width: of the residual stream.
      layers: attention and feed-forward, each.
      heads: of queries.
      kv_heads: of keys and values; fewer than `heads` is grouped-query attention.
      positions: "rotary" or "learned".
      tied: whether the head is the embedding's transpose.
      sequence: whether the devices along "model" split the sequence between the layers' products
        (sequence parallelism).
    """

    vocabulary: int = 256
    length: int = 128
    width: int = 128
    layers: int = 4
    heads: int = 8
    kv_heads: int = 8
    positions: str = "rotary"
    tied: bool = False
    sequence: bool = False

    @property
    def features(self) -> int:
        """Features of a head."""
        return self.width // self.heads

    @property
    def tensor_rules(self) -> dict[str, int]:
        """What `tx.TP` splits."""
        return {**TENSOR_RULES, "embedding": -2, **({} if self.tied else {"head": -1})}

    def check(self, sizes: dict[str, int]) -> None:
        """Refuse a model that the mesh's axes cannot share."""
        model, context = sizes["model"], sizes["context"]
        if self.width % (2 * self.heads):
            raise ValueError(
                f"the width, {self.width}, needs to be an even multiple of the {self.heads} heads"
            )
        tx.tensor.check_heads(self.heads, self.kv_heads, devices=model)
        parts = (2 * context if context > 1 else 1) * (model if self.sequence else 1)
        if self.length % parts:
            raise ValueError(
                f"the length, {self.length}, needs to be a multiple of {parts}: two chunks for "
                f"each of {context} devices along 'context'"
                + (f", times {model} along 'model' that share them" if self.sequence else "")
            )


def init(config: GPT, seed: int = 0) -> dict[str, Any]:
    """Return the parameters, float32, the same on any number of devices."""
    rng = np.random.default_rng(seed)
    width, layers, inner = config.width, config.layers, 4 * config.width
    columns = (config.heads + 2 * config.kv_heads) * config.features

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        values = rng.standard_normal(shape, np.float32)
        return values * np.float32(scale / np.sqrt(shape[-2]))

    deep = 1 / np.sqrt(2 * layers)  # of what is added to the residual stream
    params = {
        "embedding": 0.02 * rng.standard_normal((config.vocabulary, width), np.float32),
        "norm": np.ones(width, np.float32),
        "blocks": {
            "norm1": np.ones((layers, width), np.float32),
            "qkv": normal(layers, width, columns),
            "out": normal(layers, width, width, scale=deep),
            "norm2": np.ones((layers, width), np.float32),
            "up": normal(layers, width, inner),
            "down": normal(layers, inner, width, scale=deep),
        },
    }
    if config.positions == "learned":
        params["positions"] = 0.02 * rng.standard_normal((config.length, width), np.float32)
    if not config.tied:
        params["head"] = normal(width, config.vocabulary)
    return params


def functions(config: GPT, cast: Callable[[Any], Any]) -> tuple[Function, Function, Function]:
    """Return `first`, `block` and `last`, computing in the dtype of `cast`."""
    dim = 1 if config.sequence else None

    def first(params: Any, batch: Any) -> jax.Array:
        tokens, params = batch["tokens"], cast(params)
        x = tx.tensor.embedding(tokens, params["embedding"], axis="model", scatter_dim=dim)
        if config.positions == "learned":
            rows = params["positions"][tx.context.positions("context", tokens.shape[1])]
            x = x + (own_rows(rows) if config.sequence else rows)
        return x

    def block(params: Any, x: jax.Array, batch: Any, stage: Any) -> jax.Array:
        params = cast(params)
        rotate = make_rotation(config, batch["tokens"].shape[1])
        norms = enter_norm(config, params["norm1"]), enter_norm(config, params["norm2"])
        for i in range(params["norm1"].shape[0]):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params)
            x = x + attend(config, layer, normalise(x, norms[0][i]), rotate)
            h = normalise(x, norms[1][i])
            h = tx.tensor.column_dense(h, layer["up"], axis="model", gather_dim=dim, name="up")
            h = activate(h)
            x = x + tx.tensor.row_dense(
                h, layer["down"], axis="model", scatter_dim=dim, name="down"
            )
        return x

    def last(params: Any, x: jax.Array, batch: Any) -> jax.Array:
        logits = head(config, cast(params), x)
        return tx.tensor.cross_entropy(logits, batch["labels"], axis="model")

    return first, block, last


@jax.checkpoint  # of the backward pass' needs, to read twice as much takes longer than a tanh
def activate(h: jax.Array) -> jax.Array:
    """Return GELU by its tanh, computed in float32."""
    return jax.nn.gelu(h.astype(jnp.float32)).astype(h.dtype)


def attend(config: GPT, layer: Any, x: jax.Array, rotate: Callable[..., Any]) -> jax.Array:
    """Return what attention adds: this device's heads, over the whole sequence."""
    dim = 1 if config.sequence else None
    made = tx.tensor.column_dense(x, layer["qkv"], axis="model", gather_dim=dim, name="qkv")
    # The columns lie group by group: the queries that share keys and values, then those.
    batch, tokens, columns = made.shape
    shared = config.heads // config.kv_heads
    groups = columns // ((shared + 2) * config.features)
    made = made.reshape(batch, tokens, groups, shared + 2, config.features)
    q, k, v = jnp.split(made, (shared, shared + 1), axis=3)
    q, k, v = (x.reshape(batch, tokens, -1, config.features) for x in (q, k, v))
    out = tx.context.ring_attention(rotate(q), rotate(k), v, axis="context")
    out = out.reshape(batch, tokens, groups * shared * config.features)
    return tx.tensor.row_dense(out, layer["out"], axis="model", scatter_dim=dim, name="out")


def head(config: GPT, params: Any, x: jax.Array) -> jax.Array:
    """Return this device's columns of the logits."""
    h = normalise(x, enter_norm(config, params["norm"]))
    w = params["embedding"].T if config.tied else params["head"]
    dim = 1 if config.sequence else None
    return tx.tensor.column_dense(h, w, axis="model", gather_dim=dim, name="head")


def enter_norm(config: GPT, scale: jax.Array) -> jax.Array:
    """Return a norm's scale for this device's part of the sequence: its gradient is a sum."""
    return tx.tensor.enter(scale, "model", name="norm") if config.sequence else scale


def make_rotation(config: GPT, tokens: int) -> Callable[[jax.Array], jax.Array]:
    """Return what turns queries and keys by their places (rotary positions), or leaves them."""
    if config.positions == "learned":
        return lambda x: x
    half = config.features // 2
    places = tx.context.positions("context", tokens)
    angles = places[:, None] * 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)

    def rotate(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)  # of features (a, b): (a cos - b sin, b cos + a sin)
        return (wide * cos + jnp.roll(wide, half, axis=-1) * sin).astype(x.dtype)

    return rotate


def normalise(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Divide by the root mean square of the features, taken in float32."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * inverse).astype(x.dtype) * scale


def own_rows(x: jax.Array) -> jax.Array:
    """Return this device's rows of what is the same along "model"."""
    size = x.shape[0] // tx.axis_size("model")
    x = tx.tensor.enter(x, "model", name="positions")
    return jax.lax.dynamic_slice_in_dim(x, tx.axis_index("model") * size, size)
