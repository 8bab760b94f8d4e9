"""How much of a model is whole at a time, on machines that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from target_cases import available

import txcore as tx
from txcore.profiling.targets import parse_target

DEVICES, LAYERS, SIZE = 8, 8, 8192


def block(w, x):
    return jnp.tanh(x @ w)


def layer_by_layer(shards, x):
    for shard in shards:
        x = tx.zero.layer(block)(shard, x)
    return jnp.mean(x**2)


def next_one_early(shards, x):
    return jnp.mean(tx.zero.layers(block, shards, x) ** 2)


@pytest.mark.parametrize("target", ["cuda:h100:8", "tpu:v5e:2x4"])
@pytest.mark.parametrize("loss, bound", [(layer_by_layer, 2.6), (next_one_early, 4.2)])
def test_layers_that_are_written_out_are_whole_one_by_one(loss, bound, target):
    """In whole layers, with the whole gradient of one; all of them would be 8 and more."""
    devices = parse_target(available(target)).devices[:DEVICES]
    mesh = Mesh(np.array(devices), ("data",))

    def gradients(parts, x):
        shards = [tx.zero.Shard(part, -2, ("data",), f"w{i}") for i, part in enumerate(parts)]
        return tx.grad(loss, axis="data")(shards, x)

    spec = [P("data")] * LAYERS
    mapped = jax.shard_map(gradients, mesh=mesh, in_specs=(spec, P("data")), out_specs=spec)

    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, P("data")))

    given = [shape(SIZE, SIZE)] * LAYERS, shape(16 * DEVICES, SIZE)
    held = jax.jit(mapped).lower(*given).compile().memory_analysis().temp_size_in_bytes
    assert held < bound * 4 * SIZE * SIZE
