"""Time of each collective, and of the mean by each algorithm, and its bus bandwidth.

As `txcore bench` measures them, which checks every element; here beside the other suites.
"""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import txcore as tx
from txcore import bench
from txcore.bench import check, measure
from txcore.parallel.gradients.algorithms import ALGORITHMS
from txcore.profiling.bandwidth import bus_factor

DEVICES = 2
SIZES = {"4KiB": 2**12, "1MiB": 2**20, "16MiB": 2**24}
MEANS = {f"pmean-{name}": functools.partial(bench.mean_by, name) for name in ALGORITHMS}
MAKE = {name: lambda name=name: bench.OPERATIONS[name] for name in bench.OPERATIONS} | MEANS


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("name", [name for name in MAKE if name != "pmean-hierarchical"])
def test_collective(benchmark, name, size):
    operation = MAKE[name]()
    setup = bench.Setup(tx.MeshSpec(jax.devices()[:DEVICES]).mesh, ("data",), in_place=False)
    count = operation.count(size, 4, DEVICES)
    elements = operation.operand(count, DEVICES)
    compiled = measure.compile_operation(setup, operation, "float32", elements)
    drawn = check.draw_operand(0)
    assert measure.check_results(setup, operation, "float32", count, compiled, drawn) == 0
    rows = jax.sharding.NamedSharding(setup.mesh, PartitionSpec("data"))
    x = jax.device_put(np.zeros((DEVICES, elements), np.float32), rows)

    benchmark(lambda: jax.block_until_ready(compiled(x)))

    benchmark.extra_info |= {"devices": DEVICES, "bytes": size}
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        factor = float(bus_factor(operation.kind, DEVICES))
        benchmark.extra_info["bus_gb_per_s"] = factor * size / seconds / 1e9
