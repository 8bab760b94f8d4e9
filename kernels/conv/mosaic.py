"""The convolution in Pallas kernels for TPUs: images lie in the lanes, interpreted elsewhere.

The images become (height, width * channels, batch): 128 of them fill the lanes of a vector
register, and a shift by a row moves no data. `mosaic_kernels` describes the products.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from txcore import _compat, varying
from txcore.kernels.common import mosaic_blocks
from txcore.kernels.conv import mosaic_kernels
from txcore.kernels.conv.geometry import Geometry
from txcore.kernels.conv.strips import LANES, Config, Strips, place_filters
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem

Residuals = tuple[jax.Array, jax.Array, jax.Array | None]
Block = tuple[tuple[int, ...], Any]  # a shape in vector memory, and its dtype
VMEM_BYTES = 60 << 20  # of the 64 MiB and more that a TPU has since v4


def list_configs(problem: Problem) -> Sequence[Config]:
    """Return the strips worth trying, the best guess first."""
    strips = _strips_of(problem, Config())
    columns = strips.geometry.pooled_size[1]
    divisors = [n for n in range(1, columns + 1) if columns % n == 0]
    best = sorted(divisors, key=lambda n: Strips(strips.geometry, n, strips.images).product_cost)
    return [Config(n) for n in best[:3]]


def explain_refusal(problem: Problem) -> str | None:
    """Return why the kernels cannot compute a problem, or None."""
    if 0 in problem.shapes[0]:
        return f"its kernel needs at least one pixel, and x is {problem.shapes[0]}"
    needed = min(_count_vmem(_strips_of(problem, config)) for config in list_configs(problem))
    if problem.platform == "tpu" and needed > VMEM_BYTES:
        return (
            f"its kernel holds 128 whole images in a TPU's vector memory, and the {needed} bytes "
            f"of them are more than {VMEM_BYTES} (use smaller images or fewer channels)"
        )
    return mosaic_blocks.explain_refusal(problem)


def _strips_of(problem: Problem, config: Config) -> Strips:
    x, w = (jax.ShapeDtypeStruct(s, problem.dtypes[0]) for s in problem.shapes[:2])
    options = (problem.get_option(name) for name in ("activation", "pool", "padding"))
    return Strips.from_config(Geometry.from_shapes(x, w, *options), config)


def _count_vmem(strips: Strips) -> int:
    """Return the bytes of the largest kernel's blocks, each twice, and of its scratch memory."""
    geometry, lanes = strips.geometry, strips.images
    images = (geometry.height, geometry.width * geometry.channels, lanes)
    results = (*geometry.pooled_size, geometry.features, lanes)
    wide = geometry.accumulator
    blocks = [(images, geometry.dtype), (results, geometry.dtype), (results, jnp.dtype("int8"))]
    blocks += [((strips.rows, strips.depth), wide)]
    scratch = [((*strips.padded_shape, lanes), wide), ((strips.depth, lanes), wide)]
    scratch += [((strips.rows, lanes), wide)] * 2  # a strip's cotangent, and its products
    return 2 * sum(map(_count_bytes, blocks)) + sum(map(_count_bytes, scratch))


def _count_bytes(block: Block) -> int:
    """Return what a block takes in vector memory, whose last two dims are cut in tiles."""
    (*outer, rows, lanes), dtype = block
    tile = 1 if rows == 1 else 32 // jnp.dtype(dtype).itemsize
    size = -(-rows // tile) * tile * -(-lanes // 128) * 128 * jnp.dtype(dtype).itemsize
    for length in outer:
        size *= length
    return size


def conv2d(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    *,
    config: Config,
    activation: str | None,
    pool: int | None,
    padding: str,
) -> jax.Array:
    """Compute the op of `txcore.kernels.conv2d` on checked operands."""
    strips = Strips.from_config(Geometry.from_shapes(x, w, activation, pool, padding), config)
    is_cut = strips.images % LANES != 0 and strips.images < x.shape[0]
    if is_cut and registry.current_device()[0] == "tpu":
        raise ValueError(
            f"conv2d: images of Config needs a multiple of {LANES} on a TPU, or the whole batch of "
            f"{x.shape[0]}, got {config.images}: leave it out"
        )
    return _conv2d(x, w, b, strips)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv2d(x: jax.Array, w: jax.Array, b: jax.Array, strips: Strips) -> jax.Array:
    return _forward(x, w, b, strips)[0]


def _forward(
    x: jax.Array, w: jax.Array, b: jax.Array, strips: Strips
) -> tuple[jax.Array, Residuals]:
    geometry = strips.geometry
    images = x.transpose(1, 2, 3, 0).reshape(geometry.height, -1, geometry.batch)
    bias = jnp.pad(b.astype(geometry.accumulator), (0, strips.features - geometry.features))
    bias = jnp.tile(bias, strips.windows)[:, None]
    results = [x.dtype, *([jnp.int8] if geometry.pool > 1 or geometry.relu else [])]
    out, *choice = _call_kernel(
        mosaic_kernels.forward,
        strips,
        [images, place_filters(w, strips), bias],
        [((*geometry.pooled_size, geometry.features, geometry.batch), dtype) for dtype in results],
        [strips.padded_shape, (strips.depth,)],
    )
    return out.transpose(3, 0, 1, 2), (images, w, choice[0] if choice else None)


def _backward(
    strips: Strips, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    images, w, choice = residuals
    geometry = strips.geometry
    g = g.transpose(1, 2, 3, 0)
    sources = [g] if choice is None else [g, choice]
    wide = geometry.accumulator  # in which a filter's places are added up, to be rounded once
    placed, gather_filters = jax.vjp(lambda w: place_filters(w, strips), w.astype(wide))
    (dx,) = _call_kernel(
        mosaic_kernels.data_gradient,
        strips,
        [placed.T.astype(w.dtype), *sources],
        [(images.shape, images.dtype)],
        [strips.padded_shape, (strips.rows,)],
    )
    dx = dx.reshape(geometry.height, geometry.width, geometry.channels, geometry.batch)
    sums, db = _call_kernel(
        mosaic_kernels.filter_gradient,
        strips,
        [images, *sources],
        [((strips.rows, strips.depth), wide), ((strips.rows, strips.images), wide)],
        [strips.padded_shape, (strips.depth,), (strips.rows,)],
    )
    (dw,) = gather_filters(sums)
    db = db.reshape(-1, strips.features, strips.images).sum((0, 2))[: geometry.features]
    return dx.transpose(3, 0, 1, 2), dw.astype(w.dtype), db.astype(g.dtype)


_conv2d.defvjp(_forward, _backward)


def _call_kernel(
    kernel: Callable[..., None],
    strips: Strips,
    operands: Sequence[jax.Array],
    results: Sequence[Block],
    scratch: Sequence[tuple[int, ...]],
) -> list[jax.Array]:
    """Run a kernel on blocks of images: compiled for a TPU, interpreted elsewhere.

    Args:
      kernel: called with a reference to each operand's and result's block and to each scratch
        array, and `strips=`.
      strips: the convolution.
      operands: arrays with the batch as their last dim; of matrices each program sees the whole.
      results: the same of the results; to a matrix each program adds.
      scratch: the shapes of arrays in vector memory, without the lanes.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    compiled = registry.current_device()[0] == "tpu"
    blocks = -(-strips.geometry.batch // strips.images)
    is_sum = any(len(shape) == 2 for shape, _ in results)

    def block_of(shape: tuple[int, ...]) -> Any:
        if len(shape) == 2:
            return pl.BlockSpec(shape, lambda n: (0, 0))
        return pl.BlockSpec((*shape[:-1], strips.images), lambda n: (*[0] * (len(shape) - 1), n))

    def run_blocks(*arrays: jax.Array) -> list[jax.Array]:
        return pl.pallas_call(  # type: ignore[no-any-return]
            partial(kernel, strips=strips),
            [_compat.shape_like(arrays[0], shape, dtype) for shape, dtype in results],
            grid=(blocks,),
            in_specs=[block_of(array.shape) for array in arrays],
            out_specs=[block_of(shape) for shape, _ in results],
            scratch_shapes=[
                tpu.VMEM((*shape, strips.images), strips.geometry.accumulator) for shape in scratch
            ],
            interpret=not compiled,
            cost_estimate=pl.CostEstimate(
                flops=blocks * strips.flops,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
                transcendentals=0,
            ),
            compiler_params=tpu.CompilerParams(
                dimension_semantics=("arbitrary" if is_sum else "parallel",),
                vmem_limit_bytes=VMEM_BYTES,
            ),
        )(*arrays)

    arrays = varying.match_varying(*operands)
    return run_blocks(*arrays) if compiled else varying.run_untracked(run_blocks, *arrays)  # type: ignore[no-any-return]
