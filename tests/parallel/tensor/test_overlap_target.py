"""Collective matmul for H100: products stand between the start and the done of each exchange."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from target_cases import available

import txcore as tx
from txcore import kernels
from txcore.profiling import costs

N, WIDTH, HIDDEN, TOKENS = 8, 4096, 16384, 4 * 8192


def two_layers(mesh, overlap):
    """Return the gradients of a column and a row layer, sequence-parallel, on 8 devices."""

    def loss_of(w1, w2, x):
        column = {"axis": "model", "gather_dim": 1, "overlap": overlap}
        row = {"axis": "model", "scatter_dim": 1, "overlap": overlap}
        inner = jax.nn.relu(tx.tensor.column_dense(x, w1, **column))
        return jnp.sum(tx.tensor.row_dense(inner, w2, **row).astype(jnp.float32) ** 2)

    def shape(dims, spec):
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    specs = (P(None, "model"), P("model"), P(None, "model"))
    differentiate = jax.grad(loss_of, argnums=(0, 1, 2))
    mapped = jax.shard_map(differentiate, mesh=mesh, in_specs=specs, out_specs=specs)
    shapes = ((WIDTH, HIDDEN), (HIDDEN, WIDTH), (4, TOKENS // 4, WIDTH))
    args = [shape(dims, spec) for dims, spec in zip(shapes, specs, strict=True)]
    return jax.jit(mapped, compiler_options=kernels.compiler_options("cuda")), args


@pytest.mark.parametrize("overlap", [True, False])
def test_exchanges_run_beside_products(overlap):
    there = {"target": available("cuda:h100:8"), "mesh": {"model": N}}
    found = costs(lambda mesh: two_layers(mesh, overlap), **there).schedule
    beside = [one for one in found.overlaps if one.is_async and one.flops]
    if not overlap:  # what they gather, products wait for; one of four is hidden
        assert len(beside) <= 1
        assert found.hidden < 0.5
        return
    assert {one.kind for one in found.overlaps} == {"collective-permute"}
    assert all(one.is_async for one in found.overlaps)
    # Of the two directions of the forward scatter one begins after the products of a trip.
    assert len(beside) >= len(found.overlaps) - 1
    assert found.hidden > 0.8
