"""Time of one collective over 2 devices, and its bus bandwidth as nccl-tests defines it."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import txcore as tx

DEVICES = 2
SIZES = {"4KiB": 2**12, "1MiB": 2**20, "16MiB": 2**24}

# Per op: what it does, its result's spec, and bus bandwidth / (size / time), where size is the
# bytes that every device ends with (all-gather) or starts with (the others).
# https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
OPS = {
    "psum": (lambda x: tx.psum(x, "data"), P(), 2 * (DEVICES - 1) / DEVICES),
    "all_gather": (
        lambda x: tx.all_gather(x, "data", invariant=True),
        P(),
        (DEVICES - 1) / DEVICES,
    ),
    "reduce_scatter": (
        lambda x: tx.reduce_scatter(x, "data"),
        P("data"),
        (DEVICES - 1) / DEVICES,
    ),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("op", OPS)
def test_collective(benchmark, op, size):
    collective, out_spec, factor = OPS[op]
    mesh = tx.MeshSpec(jax.devices()[:DEVICES])
    mapped = jax.shard_map(collective, mesh=mesh.mesh, in_specs=P("data"), out_specs=out_spec)
    # all_gather's size is the gathered one; the others' is each device's whole operand.
    held = size if op == "all_gather" else size * DEVICES
    x = jax.device_put(np.ones(held // 4, np.float32), mesh.sharding("data"))
    compiled = jax.jit(mapped).lower(x).compile()

    result = benchmark(lambda: jax.block_until_ready(compiled(x)))

    np.testing.assert_array_equal(result, 1 if op == "all_gather" else DEVICES)
    benchmark.extra_info |= {"devices": DEVICES, "bytes": size}
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["bus_gb_per_s"] = factor * size / seconds / 1e9
