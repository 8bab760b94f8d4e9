"""Two layers of which each device along "model" holds a part of the hidden units, and the truth."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import txcore as tx

RULES = {"mlp/w1": P(None, "model"), "mlp/b1": P("model"), "mlp/w2": P("model", None)}
MESHES = [(2, 1), (1, 2), (2, 2), (4, 2)]


def params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w1": (6, 8), "b1": (8,), "w2": (8, 3)}
    mlp = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {"mlp": mlp, "b2": np.zeros(3, np.float32), "scale": np.ones(6, np.float32)}


def batch(seed=1, size=16):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(size, 6)), rng.normal(size=(size, 3))
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def mesh(data, model):
    devices = jax.devices()[: data * model]
    return tx.MeshSpec(devices, axes=("data", "model"), shape=(data, model))


def plan(rules=None):
    return tx.Plan(data_parallel=tx.DP("data"), params=RULES if rules is None else rules)


def engine(shape, optimizer=None, *, rules=None, **options):
    return tx.Engine(
        mesh=mesh(*shape),
        plan=plan(rules),
        optimizer=optimizer or tx.optim.sgd(0.1, momentum=0.9),
        **options,
    )


def outputs(p, x, cast=lambda tree: tree):
    """The second layer adds up the parts: Megatron's pair of a cast and a sum."""
    p, x = cast((p, x))
    x = tx.vary(x * p["scale"], "model", name="inputs")
    hidden = jnp.tanh(x @ p["mlp"]["w1"] + p["mlp"]["b1"])
    return tx.psum(hidden @ p["mlp"]["w2"], "model", name="outputs") + p["b2"]


def loss_of(p, b, cast=lambda tree: tree):
    errors = (outputs(p, b["x"], cast) - b["y"].astype(jnp.float32)) ** 2
    return tx.example_mean(jnp.sum(errors, -1), b.get("mask"), axis="data")


@tx.step_fn
def train_step(state, b):
    def loss(p):
        return loss_of(p, b, state.precision.cast)

    loss, grads = tx.value_and_grad(loss, loss_scale=state.loss_scale)(state.params)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}


def eval_step(state, b):
    return {"loss": tx.pmean(loss_of(state.params, b), "data", name="loss")}


def host(tree):
    return jax.tree.map(np.asarray, tree)


class Truth:
    """The same run in float64 NumPy: gradient descent with momentum, clipped by the global norm."""

    def __init__(self, start, rate=0.1, momentum=0.9, clip=None):
        self.p = jax.tree.map(np.float64, start)
        self.v = jax.tree.map(np.zeros_like, self.p)
        self.rate, self.momentum, self.clip = rate, momentum, clip
        self.norm = None

    def gradients(self, b):
        p, x, y = self.p, np.float64(b["x"]), np.float64(b["y"])
        scaled = x * p["scale"]
        hidden = np.tanh(scaled @ p["mlp"]["w1"] + p["mlp"]["b1"])
        error = hidden @ p["mlp"]["w2"] + p["b2"] - y
        out = 2 * error / len(x)
        inner = (out @ p["mlp"]["w2"].T) * (1 - hidden**2)
        mlp = {"w1": scaled.T @ inner, "b1": inner.sum(0), "w2": hidden.T @ out}
        scale = ((inner @ p["mlp"]["w1"].T) * x).sum(0)
        return (error**2).sum(1).mean(), {"mlp": mlp, "b2": out.sum(0), "scale": scale}

    def step(self, b):
        loss, grads = self.gradients(b)
        self.norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        factor = 1 if self.clip is None else min(1, self.clip / self.norm)
        self.v = jax.tree.map(lambda v, g: self.momentum * v + factor * g, self.v, grads)
        self.p = jax.tree.map(lambda p, v: p - self.rate * v, self.p, self.v)
        return loss
