"""Layers split over "model", stacked over "pipe", with one step for every plan."""

import jax
import jax.numpy as jnp
import numpy as np

import txcore as tx

WIDTH, INNER, WORDS = 32, 64, 16
TP = tx.TP("model", rules={"blocks/up": -1, "blocks/bias": -1, "blocks/down": -2})
AXES = ("data", "model", "pipe")


def params(layers=4):
    rng = np.random.default_rng(0)
    shapes = {"up": (WIDTH, INNER), "bias": (INNER,), "down": (INNER, WIDTH)}
    blocks = {n: rng.normal(0, 0.2, (layers, *s)).astype(np.float32) for n, s in shapes.items()}
    return {"blocks": blocks, "embed": rng.normal(size=(WORDS, WIDTH)).astype(np.float32)}


def batch(rows=16):
    rng = np.random.default_rng(1)
    return {name: rng.integers(0, WORDS, rows).astype(np.int32) for name in ("word", "next")}


def first(params, batch):
    return params["embed"][batch["word"]]


@jax.checkpoint
def block(params, x, batch, stage):
    for up, bias, down in zip(params["up"], params["bias"], params["down"], strict=True):
        inner = jnp.tanh(tx.tensor.column_dense(x, up, bias, axis="model"))
        x = x + tx.tensor.row_dense(inner, down, axis="model")
    return x


def last(params, x, batch):
    log_p = jax.nn.log_softmax(x @ params["embed"].T)
    return -jnp.take_along_axis(log_p, batch["next"][:, None], 1)[:, 0]


@tx.step_fn
def step(state, batch):
    loss, grads = tx.pipeline.value_and_grad(first, block, last)(state.params, batch)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}


def mesh(*shape):
    return tx.MeshSpec(jax.devices()[: int(np.prod(shape))], axes=AXES, shape=shape)
