"""The model of split_models with sharded state, on meshes of data axes ("replica", "data")."""

import jax
import jax.numpy as jnp
import split_models
from split_models import Truth, batch, host, params  # noqa: F401

import txcore as tx

DATA = ("replica", "data")
KINDS = ["optimizer", "gradients", "parameters"]


def mesh(shape):
    shape = (*shape, *[1] * (3 - len(shape)))
    size = shape[0] * shape[1] * shape[2]
    return tx.MeshSpec(jax.devices()[:size], axes=(*DATA, "model"), shape=shape)


def engine(shape, optimizer=None, *, shard=None, shard_axis=None, rules=None, **options):
    """`shape` is (replica, data) or (replica, data, model)."""
    axis = None if shard is None else shard_axis
    return tx.Engine(
        mesh=mesh(shape),
        plan=tx.Plan(data_parallel=tx.DP(DATA, shard=shard, shard_axis=axis), params=rules or {}),
        optimizer=optimizer or tx.optim.sgd(0.1, momentum=0.9),
        **options,
    )


def loss_of(p, b, cast=lambda tree: tree):
    errors = (split_models.outputs(p, b["x"], cast) - b["y"].astype(jnp.float32)) ** 2
    return tx.example_mean(jnp.sum(errors, -1), b.get("mask"), axis=DATA)


@tx.step_fn
def train_step(state, b):
    def loss(p):
        return loss_of(p, b, state.precision.cast)

    loss, grads = tx.value_and_grad(loss, loss_scale=state.loss_scale)(state.params)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, DATA, name="loss")}


def eval_step(state, b):
    return {"loss": tx.pmean(loss_of(state.params, b), DATA, name="loss")}


def run(engine, steps=3, start=None):
    state, losses = start or engine.create_state(params()), []
    for seed in range(steps):
        state, metrics = train_step(state, batch(seed))
        losses.append(float(metrics["loss"]))
    return state, losses
