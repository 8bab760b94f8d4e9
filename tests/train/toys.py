"""A small model and a step, for tests of the engine."""

import jax
import jax.numpy as jnp
import numpy as np

import txcore as tx


def mesh(n, axes=("data",), shape=None):
    return tx.MeshSpec(devices=jax.devices()[:n], axes=axes, shape=shape)


def engine(n, *, optimizer=None, **kwargs):
    return tx.Engine(
        mesh=kwargs.pop("mesh", None) or mesh(n),
        plan=kwargs.pop("plan", None) or tx.Plan(data_parallel=tx.DP(axis="data")),
        optimizer=optimizer or tx.optim.sgd(0.1),
        **kwargs,
    )


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w1": rng.normal(size=(4, 8)).astype(np.float32),
        "w2": rng.normal(size=(8, 1)).astype(np.float32),
    }


def batch(size=16, seed=1, masked=0):
    rng = np.random.default_rng(seed)
    mask = np.ones(size, np.float32)
    x = rng.normal(size=(size, 4)).astype(np.float32)
    y = x.sum(1)
    if masked:
        mask[-masked:] = 0
        x[-masked:], y[-masked:] = 1e6, -1e6  # padding may hold any number
    return {"x": x, "y": y, "mask": mask}


def losses(params, batch):
    out = jnp.tanh(batch["x"] @ params["w1"]) @ params["w2"]
    return (out[:, 0] - batch["y"]) ** 2


def local_loss(params, batch):
    return tx.example_mean(losses(params, batch), batch["mask"], axis="data")


@tx.step_fn
def train_step(state, batch):
    loss, grads = tx.value_and_grad(local_loss)(state.params, batch)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}


def eval_step(state, batch):
    return {"loss": tx.pmean(local_loss(state.params, batch), "data", name="eval")}


def reference_step(params, batch, rate=0.1):
    """One step of gradient descent in float64 NumPy."""
    keep = batch["mask"] != 0
    x, y = np.float64(batch["x"][keep]), np.float64(batch["y"][keep])
    w1, w2 = np.float64(params["w1"]), np.float64(params["w2"])
    hidden = np.tanh(x @ w1)
    error = (hidden @ w2)[:, 0] - y
    d_out = 2 * error[:, None] / len(x)
    d_hidden = d_out @ w2.T * (1 - hidden**2)
    new = {"w1": w1 - rate * x.T @ d_hidden, "w2": w2 - rate * hidden.T @ d_out}
    return new, float(np.mean(error**2))


def messages(caplog):
    """Return what txcore logged: asyncio complains of an earlier test's failed save at any time."""
    return [record.getMessage() for record in caplog.records if record.name == "txcore"]
