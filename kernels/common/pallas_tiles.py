"""Blocks, padding and calls for Pallas kernels over the tiles of a matrix."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from txcore import _compat, varying
from txcore.kernels.common import mosaic_blocks
from txcore.kernels.dispatch import registry

# A block's shape (None: one element of a dim that the kernel does not see), and its place by tile.
Spec = tuple[tuple[int | None, ...], Callable[[Any, Any], tuple[Any, ...]]]

SCALAR: Spec = ((1, 1), lambda i, j: (0, 0))


def column_spec(rows: int) -> Spec:
    """Return the block of a column vector for a tile with this number of rows."""
    return (rows, 1), lambda i, j: (i, 0)


def row_spec(columns: int) -> Spec:
    """Return the block of a row vector for a tile with this number of columns."""
    return (1, columns), lambda i, j: (0, j)


def block_size(size: int, largest: int) -> int:
    """Return the power of two that covers most of `size`, up to `largest`.

    It is at least 16 on a GPU, and on a TPU the 128 elements of a row of its vector registers.
    """
    least = 128 if registry.current_device()[0] == "tpu" else 16
    return max(least, min(largest, 1 << max(size - 1, 0).bit_length()))


def slice_block(step: Any, size: int) -> Any:
    """Return the slice of the block number `step` of a reference's dim."""
    from jax.experimental import pallas as pl

    return pl.ds(pl.multiple_of(step * size, size), size)  # which Mosaic must know to be aligned


def pad_to_blocks(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Return a matrix padded with zeros to whole blocks, at least one along each dim."""
    height, width = (
        max(-(-size // unit), 1) * unit for size, unit in zip(x.shape, (rows, columns), strict=True)
    )
    if x.shape == (height, width):
        return x
    return jnp.pad(x, ((0, height - x.shape[0]), (0, width - x.shape[1])))


def call_kernel(
    kernel: Callable[..., None],
    grid: tuple[int, int],
    operands: Sequence[tuple[jax.Array, Spec]],
    results: Sequence[tuple[tuple[int, ...], Any, Spec]],
    *,
    warps: int,
) -> list[jax.Array]:
    """Run a kernel on every tile of a grid: compiled for a GPU or a TPU, interpreted elsewhere.

    Args:
      kernel: called with a reference to each operand's and result's block.
      grid: the number of tiles along each dim.
      operands: matrices that vary along the same mesh axes, each with the block that a tile reads.
      results: shapes and dtypes, each with the block that a tile writes.
      warps: of a program on a GPU.

    Returns:
      The results.
    """
    from jax.experimental import pallas as pl

    platform = registry.current_device()[0]
    compiled = platform in ("gpu", "tpu")

    def run_grid(*arrays: jax.Array) -> list[jax.Array]:
        return pl.pallas_call(  # type: ignore[no-any-return]
            kernel,
            [_compat.shape_like(arrays[0], shape, dtype) for shape, dtype, _ in results],
            grid=grid,
            in_specs=[pl.BlockSpec(*spec) for _, spec in operands],
            out_specs=[pl.BlockSpec(*spec) for *_, spec in results],
            interpret=not compiled,
            compiler_params=_compiler_params(platform, warps),
        )(*arrays)

    arrays = [array for array, _ in operands]
    return run_grid(*arrays) if compiled else varying.run_untracked(run_grid, *arrays)


def _compiler_params(platform: str, warps: int) -> Any:
    """Return what selects the platform's back end of Pallas; an interpreter simulates a TPU."""
    if platform == "gpu":
        from jax.experimental.pallas import triton

        return triton.CompilerParams(num_warps=warps)
    from jax.experimental.pallas import tpu

    return tpu.CompilerParams(
        dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=mosaic_blocks.VMEM_BYTES
    )
