"""Time of each op at its named shapes, forward and with its gradients, and what share that is of
what this machine reaches in a plain matrix product and in a plain copy, measured here.

`-k "main and float32"` runs the main shapes alone. Two figures tell where an op stands: the share
of the product's FLOP/s counts its matrix products, that of the copy's bytes/s the least it must
move. One that is near neither 1 is bound by something else.
"""

import jax
import jax.numpy as jnp
import pytest

from txcore.kernels.tuning import measure, timing
from txcore.kernels.tuning.shapes import MAIN, SHAPES

SIDE = 2048
COPIED = 1 << 26  # float32: eight times a large cache

NAMED = [
    pytest.param(name, dtype, id=f"{'main-' if name in MAIN else ''}{name}-{dtype}")
    for dtype in ("float32", "bfloat16")
    for name in (SHAPES if dtype == "float32" else MAIN)
]


@pytest.fixture(scope="session")
def machine():
    """FLOP/s of a square product by dtype, and bytes/s of reading and writing a long array."""
    calls, flops = {}, 2 * SIDE**3
    for dtype in ("float32", "bfloat16"):
        square = jnp.ones((SIDE, SIDE), dtype)
        calls[dtype] = compile_plain(lambda x: x @ x, square)
    calls["copy"] = compile_plain(
        lambda x: x + 1, jnp.zeros(COPIED)
    )  # a mere copy would be left out
    seconds = {name: time / 1e6 for name, time in timing.alternate_calls(calls, rounds=5).items()}
    return {
        "float32": flops / seconds["float32"],
        "bfloat16": flops / seconds["bfloat16"],
        "copy": 2 * 4 * COPIED / seconds["copy"],
        "machine": measure.describe_machine(),
    }


def compile_plain(function, x):
    compiled = jax.jit(function).lower(x).compile()
    jax.block_until_ready(compiled(x))
    return lambda: jax.block_until_ready(compiled(x))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with-gradients"])
@pytest.mark.parametrize("name, dtype", NAMED)
def test_kernel(benchmark, request, name, dtype, backward):
    shape = SHAPES[name]
    if backward and not shape.differentiable:
        pytest.skip("it is used without gradients")
    if benchmark.disabled and name not in MAIN:
        pytest.skip("only the main shapes are compiled where nothing is timed")
    call = measure.compile_call(shape, dtype, None, backward=backward)
    benchmark(call)
    if benchmark.stats is None:
        return
    machine = request.getfixturevalue("machine")
    seconds = benchmark.stats.stats.median
    flops = shape.count_flops(backward=backward) / seconds
    moved = shape.count_bytes(dtype, backward=backward) / seconds
    benchmark.extra_info |= {
        "op": shape.op,
        "machine": machine["machine"],
        "flops_per_s": flops,
        "of_a_matmul": flops / machine[dtype],
        "bytes_per_s": moved,
        "of_a_copy": moved / machine["copy"],
    }
