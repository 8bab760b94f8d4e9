"""The algorithms that go piece by piece hold a few pieces beside the array, and never copy it."""

import jax
import pytest
from machine import cpu_only, mesh

from txcore import bench
from txcore.bench import measure
from txcore.parallel.gradients.algorithms.pieces import CHUNK_BYTES

WHOLE = 16 * CHUNK_BYTES


@cpu_only("reads what XLA's CPU compiler allocates")
@pytest.mark.parametrize("name", ["chunked", "ring", "recursive_doubling"])
def test_pieces_are_all_that_is_held_beside_the_array(name):
    if name == "ring" and jax.__version_info__ < (0, 11):
        pytest.skip("jax 0.10 drops the barrier that keeps XLA from copying the array")
    setup = bench.Setup(mesh(data=4), ("data",))
    compiled = measure.compile_operation(setup, bench.mean_by(name), "float32", WHOLE // 4)
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * CHUNK_BYTES
