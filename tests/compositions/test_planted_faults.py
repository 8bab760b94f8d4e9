"""Mistakes that people make, planted one by one: the kit finds each, and says where.

All are planted in a plain shard_map without tracking, where nothing but the kit looks: an engine
refuses some of them itself (tests/train/test_engine_guards.py, test_model_axis_steps.py).
TXCORE_ALL_PLANS=1 plants all of them.
"""

import functools
import os

import composed_models as models
import composed_plans as plans
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import txcore as tx


def specs_of(model):
    """Return how parameters lie on the mesh, as a plan would have them."""

    def of_leaf(path, leaf):
        keys = [key.key for key in path]
        entries: list[str | None] = [None] * leaf.ndim
        if keys[0] == "blocks":
            entries[0] = "pipe"
        if (dim := model.rules.get("/".join(keys))) is not None:
            entries[dim] = "model"
        return P(*entries)

    return jax.tree_util.tree_map_with_path(of_leaf, model.params)


def average(grads):
    return tx.pmean(grads, ("data", "context"))


@functools.cache
def compile_run(make, sizes, fault="", reduce=average, split=True, microbatches=None):
    """Return a function without arguments: loss and gradients on a mesh."""
    sizes = {**dict.fromkeys(models.AXES, 1), **dict(sizes)}
    model = make(fault=fault)
    count = int(np.prod([*sizes.values()]))
    devices = np.array(jax.devices()[:count], dtype=object).reshape(*sizes.values())
    mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * 4)
    axes = ("data", "context")

    def differentiate(params, batch):
        if fault == "swapped stage":
            params = {**params, "blocks": tx.shift(params["blocks"], "pipe", 1)}
        if sizes["pipe"] > 1:
            made = tx.pipeline.make_schedule("1f1b", stages=sizes["pipe"], microbatches=2)
            first, block, last = model.functions
            both = tx.pipeline.value_and_grad(first, block, last, made, axis="pipe", data_axis=axes)
            return both(params, batch, mask=batch["mask"])
        both = tx.value_and_grad(
            functools.partial(mean_loss, model, fault), axis=axes, microbatches=microbatches
        )
        return both(params, batch)

    def step(params, batch):
        loss, grads = differentiate(params, batch)
        return {"loss": tx.pmean(loss, axes), "grads": reduce(grads)}

    batch = model.make_batch(1)
    batch["first"] = (np.arange(models.ROWS) % 8 < 4).astype(np.float32)  # of each device
    batch["key"] = jax.random.key_data(jax.random.split(jax.random.key(0), models.ROWS))
    specs, rows = specs_of(model), {key: P("data") for key in batch}
    rows |= {key: P("data", "context") for key in model.sequence}
    out = {"loss": P(), "grads": specs}
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(specs, rows), out_specs=out, check_vma=False)
    if split:
        for key in model.sequence:
            batch[key] = tx.context.split_chunks(batch[key], sizes["context"])
    run = jax.jit(mapped, compiler_options=plans.QUICKLY)
    return functools.partial(run, model.params, batch)


def mean_loss(model, fault, params, batch):
    first, block, last = model.functions
    ends = {name: leaf for name, leaf in params.items() if name != "blocks"}
    losses = last(ends, block(params["blocks"], first(ends, batch), batch, 0), batch)
    mask = batch["mask"]
    if fault == "mask ignored in one microbatch":
        mask = jnp.maximum(mask, batch["first"])
    losses = tx.testing.record(losses * mask, "masked losses")
    return tx.example_mean(losses, mask, axis="data")


def make_gpt(fault=""):
    return models.make_gpt(1, fault)


def make_mlp(fault=""):
    return models.make_mlp(2, fault)


def find(make, sizes, fault="", **how):
    """Return what the kit says of a fault."""
    with pytest.raises(AssertionError) as found:
        tx.testing.assert_runs_agree(
            compile_run(make, (), microbatches=how.get("microbatches")),
            compile_run(make, tuple(sizes.items()), fault, **how),
            axes=sizes,
            counts={"microbatches": how["microbatches"]} if "microbatches" in how else None,
            context="context",
            row_axes=("data", "pipe"),
        )
    print(f"\n{fault}:\n{found.value}")
    return str(found.value)


def sum_twice(grads):
    return tx.psum(average(grads), ("data", "context"))


def sum_microbatches(grads):
    return jax.tree.map(lambda g: 4 * g, average(grads))


# The fault, where it is planted, and what the kit says: leaf and ratio, and the first operation.
ALL_AGREE = "all recorded operations agree"
FIRST = "the first recorded operation that differs is "
FAULTS = {
    "missing all-reduce": (make_gpt, {"model": 2}, {}, [f"{FIRST}'residual': "]),
    "mean for sum": (make_gpt, {"model": 2}, {}, [f"{FIRST}'feed-forward': "]),
    "wrong shard": (
        *(make_gpt, {"model": 2}, {}),
        [f"{FIRST}'inner': ", "by other devices: part 0 by device 1, 1 by device 0"],
    ),
    "swapped stage": (make_mlp, {"pipe": 2}, {}, [f"{FIRST}'layer', call 1 of 2: "]),
    "wrong rotary offset of a sequence shard": (
        *(make_gpt, {"context": 2}, {}),
        [f"{FIRST}'attention': "],
    ),
    "bias added on each device before the row sum": (
        *(make_gpt, {"model": 2}, {}),
        [f"{FIRST}'feed-forward': ", "by one vector in every example", "added once more"],
    ),
    "wrong token order of the context": (
        *(make_gpt, {"context": 2}, {"split": False}),
        [f"{FIRST}'embedding': ", "tokens in another order: along 'context' the first device"],
    ),
    "gradient of the tied embedding counted once": (
        *(make_gpt, {"model": 2}, {}),
        ["['grads']['embedding'] differs", ALL_AGREE],
    ),
    "dropout key equal on all shards": (
        *(make_mlp, {"data": 2}, {}),
        [f"{FIRST}'dropout': 8 of 16 examples"],
    ),
    "mask ignored in one microbatch": (
        *(make_mlp, {"data": 2}, {"microbatches": 2}),
        [f"{FIRST}'masked losses'"],
    ),
    "gradients summed twice": (
        *(make_mlp, {"data": 2}, {"reduce": sum_twice}),
        [
            "['grads']['blocks']['b'] differs between the runs: 64 of 64 elements",
            "ratio second/first 2 = N for N = 2 devices along 'data': summed where the mean is",
            ALL_AGREE,
        ],
    ),
    "missing 1/microbatches": (
        *(make_mlp, {"data": 2}, {"reduce": sum_microbatches, "microbatches": 4}),
        ["ratio second/first 4 = N for N = 4 microbatches: summed where the mean is", ALL_AGREE],
    ),
    "missing all-reduce of the backward pass": (
        *(make_mlp, {"model": 2}, {}),
        ["['grads']", ALL_AGREE],
    ),
}


# The others take their compile time with TXCORE_ALL_PLANS=1.
ALWAYS = (
    "wrong shard",
    "swapped stage",
    "wrong token order of the context",
    "dropout key equal on all shards",
    "mask ignored in one microbatch",
    "gradients summed twice",
)
CHOSEN = FAULTS if os.environ.get("TXCORE_ALL_PLANS") == "1" else ALWAYS


@pytest.mark.parametrize("fault", CHOSEN)
def test_a_planted_fault_is_found_and_named(fault):
    make, sizes, how, texts = FAULTS[fault]
    said = find(make, sizes, fault, **how)
    for text in texts:
        assert text in said
