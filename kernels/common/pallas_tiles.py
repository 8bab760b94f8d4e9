"""Blocks, padding and calls for Pallas kernels over the tiles of a matrix."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from txcore import _compat, varying
from txcore.kernels.dispatch import registry

Spec = tuple[
    tuple[int, int], Callable[[Any, Any], tuple[Any, Any]]
]  # a block's shape, and its place by tile

SCALAR: Spec = ((1, 1), lambda i, j: (0, 0))


def column_spec(rows: int) -> Spec:
    """Return the block of a column vector for a tile with this number of rows."""
    return (rows, 1), lambda i, j: (i, 0)


def row_spec(columns: int) -> Spec:
    """Return the block of a row vector for a tile with this number of columns."""
    return (1, columns), lambda i, j: (0, j)


def block_size(size: int, largest: int) -> int:
    """Return the power of two, from 16 (a GPU's least) to `largest`, that covers most of `size`."""
    return max(16, min(largest, 1 << max(size - 1, 0).bit_length()))


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
    """Run a kernel on every tile of a grid: compiled for a GPU, interpreted elsewhere.

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
    from jax.experimental.pallas import triton

    on_gpu = registry.current_device()[0] == "gpu"

    def run_grid(*arrays: jax.Array) -> list[jax.Array]:
        return pl.pallas_call(  # type: ignore[no-any-return]
            kernel,
            [_compat.shape_like(arrays[0], shape, dtype) for shape, dtype, _ in results],
            grid=grid,
            in_specs=[pl.BlockSpec(*spec) for _, spec in operands],
            out_specs=[pl.BlockSpec(*spec) for *_, spec in results],
            interpret=not on_gpu,
            compiler_params=triton.CompilerParams(num_warps=warps),
        )(*arrays)

    arrays = [array for array, _ in operands]
    return run_grid(*arrays) if on_gpu else varying.run_untracked(run_grid, *arrays)
