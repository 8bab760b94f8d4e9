"""Steps and engines in float16, for its tests."""

import jax
import jax.numpy as jnp
import numpy as np
import toys

import txcore as tx


def engine(n=1, *, precision="float16", **kwargs):
    return toys.engine(n, precision=precision, **kwargs)


def policy(**kwargs):
    return tx.Precision("float16", loss_scale=tx.LossScale(**kwargs))


def predicted(state, params, batch):
    """The toy model in the dtype of the policy."""
    params, x = state.precision.cast((params, batch["x"]))
    return (jnp.tanh(x @ params["w1"]) @ params["w2"])[:, 0]


def local_loss(state, params, batch, count=None):
    error = predicted(state, params, batch) - state.precision.cast(batch["y"])
    return tx.example_mean(error.astype(jnp.float32) ** 2, batch["mask"], axis="data", count=count)


@tx.step_fn
def train_step(state, batch):
    def loss_of(params):
        return local_loss(state, params, batch)

    loss, grads = tx.value_and_grad(loss_of, loss_scale=state.loss_scale)(state.params)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}


@tx.step_fn
def step_on_w(state, batch):
    """Gradient of one parameter: the mean of the batch. In float32, so no scale overflows it."""

    def loss_of(w):
        return jnp.mean(w * batch)

    loss, grads = tx.value_and_grad(loss_of, loss_scale=state.loss_scale)(state.params)
    return state.apply_gradients(grads=tx.pmean(grads, "data")), {"loss": tx.pmean(loss, "data")}


def huge(batch, *examples):
    """The batch with inputs in some examples that float16 does not hold."""
    x = np.array(batch["x"])
    x[list(examples)] = 1e6
    return {**batch, "x": x}


def on_host(tree):
    """Copies of a tree's arrays, alive after the state that holds them was donated."""
    return jax.tree.map(np.array, tree)
