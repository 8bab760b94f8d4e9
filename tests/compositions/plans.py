"""Engines and steps for any composition of data, context, pipe and model."""

import math

import jax
import models
import numpy as np

import txcore as tx

SCHEDULES = ("gpipe", "1f1b", "zb-h1", "interleaved")


def make_engine(
    model, data=1, context=1, pipe=1, mp=1, *, schedule="1f1b", microbatches=None, dp=None, **options
):
    """Return an engine on the first devices; `mp` are those along "model"."""
    sizes = (data, context, pipe, mp)
    microbatches = microbatches or 2
    chunks = 2 if schedule == "interleaved" else 1
    plan = tx.Plan(
        data_parallel=tx.DP("data", **(dp or {})),
        tensor_parallel=tx.TP("model", rules=model.rules),
        pipeline=tx.PP("pipe", microbatches=microbatches, schedule=schedule, chunks=chunks),
        context="context" if context > 1 else None,
    )
    return tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[: math.prod(sizes)], models.AXES, sizes),
        plan=plan,
        optimizer=options.pop("optimizer", tx.optim.sgd(0.3, momentum=0.9)),
        **options,
    )


def prepare(model):
    """Return what gives each engine the tokens in its order."""

    def order(batch, engine):
        n = engine.mesh.shape["context"]
        return {
            key: tx.context.split_chunks(leaf, n) if n > 1 and key in model.sequence else leaf
            for key, leaf in batch.items()
        }

    return order


def make_step(model, reduce=None):
    both = tx.pipeline.value_and_grad(*model.functions)

    @tx.step_fn
    def step(state, batch):
        loss, grads = both(state.params, batch, mask=batch["mask"])
        if reduce is not None:
            grads = reduce(grads)
        else:
            grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    return step


def stacked(tree):
    """Return parameters with the layers as one dim, whatever the chunks."""
    return np.asarray(tree)
