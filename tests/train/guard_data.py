"""What the steps of the guards' table are about: linear regression, and its truth in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import txcore as tx

RATE = 0.1


def f64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(8, 3)).astype(np.float32)
Y = (X @ np.float32([1, -2, 3]) + _RNG.normal(size=8)).astype(np.float32)
MASK = np.float32([1, 1, 1, 0, 1, 0, 0, 0])
WEIGHTS = np.float32([1, 2, 3, 4, 5, 0.5, 0.25, 0])
TOKENS = _RNG.normal(size=(8, 4)).astype(np.float32)
TOKEN_MASK = (np.arange(4) < np.array([4, 1, 2, 3, 4, 1, 1, 1])[:, None]).astype(np.float32)
BATCH = {"x": X, "y": Y, "m": MASK, "w": WEIGHTS, "t": TOKENS, "tm": TOKEN_MASK}
PARAMS = {"w": np.float32([0.3, -0.2, 0.5]), "b": np.float32(0.1)}
EXTRA = {"a": np.float32(2.0), "v": np.float32([1.0, -1.0, 0.5])}


def errors(params, batch):
    return (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2


def mse(params, batch):
    return jnp.mean(errors(params, batch))


def engine(n, axes=("data",)):
    shape = {("data",): (n,), ("a", "b"): {1: (1, 1), 2: (1, 2), 4: (2, 2)}[n]}[axes]
    return tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:n], axes=axes, shape=shape),
        plan=tx.Plan(data_parallel=tx.DP(axes if len(axes) > 1 else axes[0])),
        optimizer=tx.optim.sgd(RATE),
    )


def run(step, n, axes=("data",)):
    """The metrics, parameters and extra after one step on n devices."""
    made = engine(n, axes)
    state, metrics = tx.step_fn(step)(made.create_state(PARAMS, EXTRA), BATCH)
    return jax.tree.map(_copies, (metrics, state.stored_params, state.extra))


def _copies(x):
    """An array as a device holds it; all the devices', stacked, where they differ."""
    copies = np.stack([np.asarray(shard.data) for shard in x.addressable_shards])
    return copies[0] if (copies == copies[0]).all() else copies


# In float64, by hand.
_X, _Y = f64(X), f64(Y)
_W, _B = f64(PARAMS["w"]), f64(PARAMS["b"])
_ERROR = _X @ _W + _B - _Y
SQUARES = _ERROR**2
GRAD = {"w": 2 * _X.T @ _ERROR / 8, "b": 2 * _ERROR.mean()}


def updated(grad=None, **changes):
    """The parameters after a step with a gradient; that of the mean of the squares by default."""
    grad = {**(GRAD if grad is None else grad), **changes}
    return {"w": _W - RATE * grad["w"], "b": _B - RATE * grad["b"]}


def weighted(weights):
    """The loss and the gradient of a weighted mean of the squares."""
    share = f64(weights) / f64(weights).sum()
    residual = 2 * share * _ERROR
    return float(share @ SQUARES), {"w": _X.T @ residual, "b": residual.sum()}
