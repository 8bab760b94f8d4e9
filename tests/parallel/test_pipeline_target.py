"""Which permutes of a pipeline run beside products, by the schedule compiled for H100."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from target_cases import available

import txcore as tx
from txcore import kernels
from txcore.profiling import costs

ROWS, WIDTH, LAYERS, MICROBATCHES = 2048, 4096, 8, 8


def block(params, x, batch, stage):
    for w in params["w"]:
        x = x + jnp.tanh(x @ w)
    return x


def block_with_permute(params, x, batch, stage):
    return block(params, tx.shift(x, "model", 1), batch, stage)


def pipeline(mesh, block):
    schedule = tx.pipeline.make_schedule("1f1b", stages=4, microbatches=MICROBATCHES)
    step = tx.pipeline.value_and_grad(
        lambda params, batch: batch,
        block,
        lambda params, x, batch: jnp.mean(x.astype(jnp.float32) ** 2, -1),
        *(schedule,),
        axis="pipe",
        data_axis="model",
    )

    def shape(dims, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=sharding)

    specs = {"blocks": {"w": P("pipe")}}
    params = {"blocks": {"w": shape((LAYERS, WIDTH, WIDTH), "pipe")}}
    batch = shape((2 * MICROBATCHES * ROWS, WIDTH), "model")

    def run(params, batch):
        loss, grads = step(params, batch)
        return tx.pmean((loss, grads), "model")

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(specs, P("model")), out_specs=(P(), specs))
    return jax.jit(mapped, compiler_options=kernels.compiler_options("cuda")), (params, batch)


@pytest.mark.parametrize("inner, hidden", [(block, False), (block_with_permute, True)])
def test_permutes_beside_products(inner, hidden):
    """Where passes stand in conditionals none; else some of those of the steady state."""
    there = {"target": available("cuda:h100:8"), "mesh": {"pipe": 4, "model": 2}}
    found = costs(lambda mesh: pipeline(mesh, inner), **there).schedule
    permutes = [one for one in found.overlaps if one.kind == "collective-permute" and one.trips > 3]
    steady = [one for one in permutes if one.trips == max(one.trips for one in permutes)]
    beside = [one for one in steady if one.flops >= 2 * ROWS * WIDTH**2]
    assert bool(beside) == hidden
