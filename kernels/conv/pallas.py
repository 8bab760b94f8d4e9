"""The convolution in Pallas kernels: interpreted, or on a GPU by Pallas' Triton lowering."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from txcore.kernels.common import pallas_masked as masked
from txcore.kernels.conv import pallas_kernels, pallas_taps
from txcore.kernels.conv.geometry import Blocks, Geometry, ceil_div
from txcore.kernels.dispatch.problem import Problem

Residuals = tuple[jax.Array, jax.Array, jax.Array | None]
DTYPES = ("float16", "bfloat16", "float32", "float64")


def list_configs(problem: Problem) -> Sequence[Blocks]:
    """Return the blocks worth trying, the best guess first."""
    features = max(16, min(64, 1 << (problem.shapes[1][3] - 1).bit_length()))
    if problem.platform != "gpu":  # an interpreter's time goes by the number of programs
        products = [Blocks(1024, features, 64, splits=1), Blocks(256, features, 64, splits=1)]
        taps = [Blocks(1024, features, splits=1, form="taps", windows=1024)]
        return [*products, *taps] if _has_few_taps(problem) else products
    products = [
        Blocks(64, features, 32),
        Blocks(128, features, 32, warps=8),
        Blocks(32, features, 32),
        Blocks(64, min(features, 32), 64, stages=3),
    ]
    few = min(features, 32)
    taps = [
        Blocks(32, few, splits=264, warps=4, form="taps", windows=32),
        Blocks(32, few, splits=264, warps=2, form="taps", windows=16),
        Blocks(16, few, splits=528, warps=1, form="taps", windows=16),
        Blocks(64, few, splits=132, warps=8, form="taps", windows=64),
        Blocks(16, few, splits=264, warps=4, form="taps", windows=16),
    ]
    return [*taps, *products] if _has_few_taps(problem) else products


def _has_few_taps(problem: Problem) -> bool:
    """Tell whether the filter is small enough for the form "taps"."""
    return math.prod(problem.shapes[1][:3]) <= pallas_taps.LARGEST_PATCH


def explain_refusal(problem: Problem) -> str | None:
    """Return why the kernels cannot compute a problem, or None."""
    (x, w, _), dtype = problem.shapes, problem.dtypes[0]
    if dtype not in DTYPES:
        return f"its kernel computes in {', '.join(DTYPES)}, and the operands are {dtype}"
    if 0 in x:
        return f"its kernel needs at least one pixel, and x is {x}"
    largest = max(math.prod(x), math.prod(x[:3]) * w[3], math.prod(w))
    return masked.explain_too_large(largest)


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
    geometry = Geometry.from_shapes(x, w, activation, pool, padding)
    if config.form == "taps" and geometry.depth > pallas_taps.LARGEST_PATCH:
        raise ValueError(
            f"conv2d: the form 'taps' needs at most {pallas_taps.LARGEST_PATCH} elements of the "
            f"filter for a feature, got {geometry.depth} from w {w.shape}: pass config=Blocks() of "
            "the form 'product', or leave config and implementation out"
        )
    return _conv2d(x, w, b, geometry, config)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _conv2d(
    x: jax.Array, w: jax.Array, b: jax.Array, geometry: Geometry, blocks: Blocks
) -> jax.Array:
    return _forward(x, w, b, geometry, blocks)[0]


def _forward(
    x: jax.Array, w: jax.Array, b: jax.Array, geometry: Geometry, blocks: Blocks
) -> tuple[jax.Array, Residuals]:
    module = pallas_taps if blocks.form == "taps" else pallas_kernels
    kernel = partial(module.forward, geometry=geometry, blocks=blocks)
    size = geometry.window_count * geometry.features
    # The backward pass needs one byte for each element of the result: which of the pooling
    # window's elements was chosen, and whether ReLU passed it.
    chosen = [(size, jnp.dtype(jnp.int8))] if geometry.pool > 1 or geometry.relu else []
    grid = (
        ceil_div(geometry.window_count, blocks.pixels),
        ceil_div(geometry.features, blocks.channels),
    )
    out, *choice = _call_kernel(kernel, grid, [(size, x.dtype), *chosen], blocks, x, w, b)
    out = out.reshape(geometry.batch, *geometry.pooled_size, geometry.features)
    return out, (x, w, choice[0] if choice else None)


def _backward(
    geometry: Geometry, blocks: Blocks, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, w, choice = residuals
    sources = (g,) if choice is None else (g, choice)
    dx = _data_gradient(w, sources, geometry, blocks)
    if blocks.form == "taps":
        return (dx, *_filter_and_bias_gradients(x, sources, geometry, blocks))
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
    grid = (ceil_div(pixels, blocks.pixels), ceil_div(geometry.channels, blocks.channels))
    size = pixels * geometry.channels
    (dx,) = _call_kernel(kernel, grid, [(size, w.dtype)], blocks, w, *sources)
    return dx.reshape(geometry.batch, geometry.height, geometry.width, geometry.channels)


def _filter_gradient(
    x: jax.Array, sources: tuple[jax.Array, ...], geometry: Geometry, blocks: Blocks
) -> jax.Array:
    all_steps = ceil_div(geometry.window_count * geometry.pool**2, blocks.pixels)
    steps = ceil_div(all_steps, min(blocks.splits, all_steps))
    splits = ceil_div(all_steps, steps)
    kernel = partial(pallas_kernels.filter_gradient, geometry=geometry, blocks=blocks, steps=steps)
    tiles = ceil_div(geometry.depth, blocks.depth) * ceil_div(geometry.features, blocks.channels)
    size = splits * geometry.depth * geometry.features
    results = [(size, geometry.accumulator)]
    (sums,) = _call_kernel(kernel, (splits, tiles), results, blocks, x, *sources)
    total = sums.reshape(splits, -1).sum(0).astype(x.dtype)
    return total.reshape(geometry.rows, geometry.columns, geometry.channels, geometry.features)


def _filter_and_bias_gradients(
    x: jax.Array, sources: tuple[jax.Array, ...], geometry: Geometry, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    all_steps = max(ceil_div(geometry.window_count, blocks.windows), 1)
    steps = ceil_div(all_steps, min(blocks.splits, all_steps))
    splits = ceil_div(all_steps, steps)
    kernel = partial(pallas_taps.filter_gradient, geometry=geometry, blocks=blocks, steps=steps)
    grid = (splits, geometry.rows, ceil_div(geometry.features, blocks.channels))
    taps = geometry.columns * geometry.channels
    results = [(splits * geometry.rows * (taps + 1) * geometry.features, geometry.accumulator)]
    (sums,) = _call_kernel(kernel, grid, results, blocks, x, *sources)
    total = sums.reshape(splits, geometry.rows, taps + 1, geometry.features).sum(0).astype(x.dtype)
    shape = (geometry.rows, geometry.columns, geometry.channels, geometry.features)
    return total[:, :-1].reshape(shape), total[0, -1]


def _call_kernel(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    results: Sequence[tuple[int, jnp.dtype]],
    blocks: Blocks,
    *operands: jax.Array,
) -> list[jax.Array]:
    return masked.call_kernel(
        kernel, grid, results, *operands, warps=blocks.warps, stages=blocks.stages
    )
