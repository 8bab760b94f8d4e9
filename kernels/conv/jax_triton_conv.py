"""The convolution by kernels in Triton's language: only on GPUs."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from txcore.kernels.common import jax_triton_calls
from txcore.kernels.conv.geometry import Blocks, Geometry, ceil_div
from txcore.kernels.dispatch.problem import Problem

Residuals = tuple[jax.Array, jax.Array, jax.Array | None]


def list_configs(problem: Problem) -> Sequence[Blocks]:
    """Return the blocks worth trying, the best guess first."""
    features = max(16, min(64, 1 << (problem.shapes[1][3] - 1).bit_length()))
    return [
        Blocks(32, features, 32, warps=8),
        Blocks(16, features, 32),
        Blocks(16, features, 32, warps=8, stages=3),
        Blocks(16, features, 16, splits=132),
    ]


def explain_refusal(problem: Problem) -> str | None:
    """Return why the kernels cannot compute a problem, or None."""
    x, w, _ = problem.shapes
    if 0 in x:
        return f"its kernel needs at least one pixel, and x is {x}"
    return jax_triton_calls.explain_refusal(problem, sizes=[x[0] * x[1] * x[2] * w[3]])


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
    if config.form != "product":
        raise ValueError(
            f"conv2d: implementation='jax_triton' needs the form 'product', got {config.form!r}: "
            "leave form out, or pass implementation='pallas_triton'"
        )
    geometry = Geometry.from_shapes(x, w, activation, pool, padding)
    return _conv2d(x, w, b, geometry, config)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _conv2d(
    x: jax.Array, w: jax.Array, b: jax.Array, geometry: Geometry, blocks: Blocks
) -> jax.Array:
    return _forward(x, w, b, geometry, blocks)[0]


def _forward(
    x: jax.Array, w: jax.Array, b: jax.Array, geometry: Geometry, blocks: Blocks
) -> tuple[jax.Array, Residuals]:
    # The backward pass needs one byte for each element of the result: which of the pooling
    # window's elements was chosen, and whether ReLU passed it.
    has_choice = geometry.pool > 1 or geometry.relu
    size = geometry.window_count * geometry.features
    grid = (ceil_div(geometry.window_count, blocks.pixels), _count_columns(geometry, blocks))
    out, *choice = _call_kernel(
        "forward",
        grid,
        [(size, x.dtype), *([(size, jnp.dtype(jnp.int8))] if has_choice else [])],
        geometry,
        blocks,
        x,
        w,
        b,
        relu=geometry.relu,
        pixels=blocks.pixels,
        **({} if has_choice else {"choice_ptr": None}),
    )
    out = out.reshape(geometry.batch, *geometry.pooled_size, geometry.features)
    return out, (x, w, choice[0] if has_choice else None)


def _backward(
    geometry: Geometry, blocks: Blocks, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, w, choice = residuals
    # A kernel without a choice does not read the operand in its place.
    sources, passed = (g, g), g
    if choice is not None:
        sources, passed = (g, choice), jnp.where(choice.reshape(g.shape) >= 0, g, 0)
    options = {"has_choice": choice is not None, "pixels": blocks.pixels * geometry.pool**2}
    dx = _data_gradient(w, sources, geometry, blocks, options)
    dw = _filter_gradient(x, sources, geometry, blocks, options)
    db = jnp.sum(passed, (0, 1, 2), dtype=geometry.accumulator).astype(g.dtype)
    return dx, dw, db


_conv2d.defvjp(_forward, _backward)


def _data_gradient(
    w: jax.Array,
    sources: tuple[jax.Array, jax.Array],
    geometry: Geometry,
    blocks: Blocks,
    options: dict[str, Any],
) -> jax.Array:
    shape = (geometry.batch, geometry.height, geometry.width)
    pixels = geometry.batch * geometry.height * geometry.width
    grid = (ceil_div(pixels, options["pixels"]), ceil_div(geometry.channels, blocks.channels))
    results = [(pixels * geometry.channels, w.dtype)]
    (dx,) = _call_kernel("data_gradient", grid, results, geometry, blocks, w, *sources, **options)
    return dx.reshape(*shape, geometry.channels)


def _filter_gradient(
    x: jax.Array,
    sources: tuple[jax.Array, jax.Array],
    geometry: Geometry,
    blocks: Blocks,
    options: dict[str, Any],
) -> jax.Array:
    all_steps = ceil_div(geometry.window_count, blocks.pixels)
    steps = ceil_div(all_steps, min(blocks.splits, all_steps))
    splits = ceil_div(all_steps, steps)
    tiles = ceil_div(geometry.depth, blocks.depth) * _count_columns(geometry, blocks)
    results = [(splits * geometry.depth * geometry.features, geometry.accumulator)]
    (sums,) = _call_kernel(
        *("filter_gradient", (splits, tiles), results, geometry, blocks, x, *sources),
        steps=steps,
        **options,
    )
    total = sums.reshape(splits, -1).sum(0).astype(x.dtype)
    return total.reshape(geometry.rows, geometry.columns, geometry.channels, geometry.features)


def _call_kernel(
    name: str,
    grid: tuple[int, int],
    results: Sequence[tuple[int, jnp.dtype]],
    geometry: Geometry,
    blocks: Blocks,
    *operands: jax.Array,
    **options: Any,
) -> list[jax.Array]:
    from txcore.kernels.conv import triton_conv

    (top, left), (out_height, out_width) = geometry.padding_before, geometry.pooled_size
    return jax_triton_calls.call_kernel(
        getattr(triton_conv, name),
        grid,
        results,
        *operands,
        warps=blocks.warps,
        stages=blocks.stages,
        windows=geometry.window_count,
        height=geometry.height,
        width=geometry.width,
        channels=geometry.channels,
        rows=geometry.rows,
        columns=geometry.columns,
        features=geometry.features,
        out_height=out_height,
        out_width=out_width,
        top=top,
        left=left,
        pool=geometry.pool,
        block=blocks.channels,
        depth=blocks.depth,
        **options,
    )


def _count_columns(geometry: Geometry, blocks: Blocks) -> int:
    """Return how many blocks of features there are."""
    return ceil_div(geometry.features, blocks.channels)
