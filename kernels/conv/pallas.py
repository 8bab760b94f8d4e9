"""The convolution in Pallas kernels: interpreted, or on a GPU by Pallas' Triton lowering."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from txcore import _compat, varying
from txcore.kernels.conv import pallas_kernels
from txcore.kernels.conv.geometry import Blocks, Geometry
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem

Residuals = tuple[jax.Array, jax.Array, jax.Array | None]
DTYPES = ("float16", "bfloat16", "float32", "float64")


def configs(problem: Problem) -> Sequence[Blocks]:
    """Return the blocks worth trying, the best guess first."""
    features = max(16, min(64, 1 << (problem.shapes[1][3] - 1).bit_length()))
    if problem.platform != "gpu":  # an interpreter's time goes by the number of programs
        return (Blocks(1024, features, 64, splits=1), Blocks(256, features, 64, splits=1))
    return (
        Blocks(64, features, 32),
        Blocks(128, features, 32, warps=8),
        Blocks(32, features, 32),
        Blocks(64, min(features, 32), 64, stages=3),
    )


def refuse(problem: Problem) -> str | None:
    """Return why the kernels cannot compute a problem, or None."""
    (x, w, _), dtype = problem.shapes, problem.dtypes[0]
    if dtype not in DTYPES:
        return f"its kernel computes in {', '.join(DTYPES)}, and the operands are {dtype}"
    if 0 in x:
        return f"its kernel needs at least one pixel, and x is {x}"
    largest = max(math.prod(x), math.prod(x[:3]) * w[3], math.prod(w))
    if largest >= 2**31:
        return (
            "its kernel counts elements in 32 bits, up to 2147483647, and an array of "
            f"{largest} is needed (use smaller batches)"
        )
    return None


def conv2d(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    *,
    config: Blocks,
    activation: str | None,
    pool: int | None,
    padding: str,
) -> jax.Array:
    """Compute the op of `txcore.kernels.conv2d` on checked operands."""
    return _conv2d(x, w, b, Geometry.of(x, w, activation, pool, padding), config)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _conv2d(
    x: jax.Array, w: jax.Array, b: jax.Array, geometry: Geometry, blocks: Blocks
) -> jax.Array:
    return _forward(x, w, b, geometry, blocks)[0]


def _forward(
    x: jax.Array, w: jax.Array, b: jax.Array, geometry: Geometry, blocks: Blocks
) -> tuple[jax.Array, Residuals]:
    kernel = partial(pallas_kernels.forward, geometry=geometry, blocks=blocks)
    size = geometry.windows * geometry.features
    # One byte for each element of the result is all that backward needs of what came before it.
    chosen = [(size, jnp.dtype(jnp.int8))] if geometry.pool > 1 or geometry.relu else []
    grid = (_ceil(geometry.windows, blocks.pixels), _ceil(geometry.features, blocks.channels))
    out, *choice = _call(kernel, grid, [(size, x.dtype), *chosen], blocks, x, w, b)
    out = out.reshape(geometry.batch, *geometry.pooled, geometry.features)
    return out, (x, w, choice[0] if choice else None)


def _backward(
    geometry: Geometry, blocks: Blocks, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, w, choice = residuals
    sources = (g,) if choice is None else (g, choice)
    dx = _data_gradient(w, sources, geometry, blocks)
    dw = _filter_gradient(x, sources, geometry, blocks)
    passed = g if choice is None else jnp.where(choice.reshape(g.shape) >= 0, g, 0)
    db = jnp.sum(passed, (0, 1, 2), dtype=geometry.accumulator).astype(g.dtype)
    return dx, dw, db


_conv2d.defvjp(_forward, _backward)


def _data_gradient(
    w: jax.Array, sources: tuple[jax.Array, ...], geometry: Geometry, blocks: Blocks
) -> jax.Array:
    kernel = partial(pallas_kernels.data_gradient, geometry=geometry, blocks=blocks)
    pixels = geometry.batch * geometry.height * geometry.width
    grid = (_ceil(pixels, blocks.pixels), _ceil(geometry.channels, blocks.channels))
    size = pixels * geometry.channels
    (dx,) = _call(kernel, grid, [(size, w.dtype)], blocks, w, *sources)
    return dx.reshape(geometry.batch, geometry.height, geometry.width, geometry.channels)


def _filter_gradient(
    x: jax.Array, sources: tuple[jax.Array, ...], geometry: Geometry, blocks: Blocks
) -> jax.Array:
    all_steps = _ceil(geometry.windows * geometry.pool**2, blocks.pixels)
    steps = _ceil(all_steps, min(blocks.splits, all_steps))
    splits = _ceil(all_steps, steps)
    kernel = partial(pallas_kernels.filter_gradient, geometry=geometry, blocks=blocks, steps=steps)
    tiles = _ceil(geometry.depth, blocks.depth) * _ceil(geometry.features, blocks.channels)
    size = splits * geometry.depth * geometry.features
    results = [(size, geometry.accumulator)]
    (sums,) = _call(kernel, (splits, tiles), results, blocks, x, *sources)
    total = sums.reshape(splits, -1).sum(0).astype(x.dtype)
    return total.reshape(geometry.rows, geometry.columns, geometry.channels, geometry.features)


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    results: Sequence[tuple[int, jnp.dtype]],
    blocks: Blocks,
    *operands: jax.Array,
) -> Any:
    """Run a kernel on flat operands, interpreted unless a GPU is there to compile it for."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    on_gpu = registry.current_device()[0] == "gpu"

    def run(*flat: jax.Array) -> Any:
        return pl.pallas_call(
            kernel,
            [_compat.shape_like(flat[0], (size,), dtype) for size, dtype in results],
            grid=grid,
            interpret=not on_gpu,
            compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        )(*flat)

    flat = [operand.reshape(-1) for operand in operands]
    return run(*flat) if on_gpu else varying.run_untracked(run, *flat)


def _ceil(size: int, block: int) -> int:
    return -(-size // block)
