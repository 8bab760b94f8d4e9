"""Calls of Pallas kernels for TPUs over the blocks of flat arrays.

Pallas reads and writes an array's last block in part, so nothing is padded.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import jax

from txcore import _compat, varying
from txcore.kernels.common import pallas_masked as masked
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem

VMEM_BYTES = 32 << 20  # of the 64 MiB and more that a TPU has since v4
DTYPES = ("bfloat16", "float32")  # what a TPU's vector unit loads and stores


def explain_refusal(problem: Problem, *results: str) -> str | None:
    """Return why a kernel for TPUs cannot compute a problem, or None.

    Args:
      problem: what to compute.
      *results: the dtypes of its results.
    """
    floats = (*problem.dtypes, *results)
    other = sorted({name for name in floats if "float" in name and name not in DTYPES})
    if problem.platform == "tpu" and other:
        return f"its kernel computes in {' and '.join(DTYPES)}, and got {', '.join(other)}"
    return masked.explain_too_large(*map(prod, problem.shapes))


def explain_too_wide(*tiles: int) -> str | None:
    """Return why blocks of these bytes do not fit into a TPU's vector memory, or None."""
    most = VMEM_BYTES // 4  # twice, since the next ones arrive meanwhile; and room for the products
    if sum(tiles) <= most:
        return None
    return (
        f"its kernel holds whole rows and columns of its factors in a TPU's vector memory, and "
        f"{sum(tiles)} bytes of them are more than {most} (use fewer features or smaller batches)"
    )


def call_kernel(
    kernel: Callable[..., None],
    size: int,
    elements: int,
    arrays: Sequence[jax.Array],
    scalars: jax.Array,
    dtypes: Sequence[Any],
    *,
    aliases: Mapping[int, int],
) -> list[jax.Array]:
    """Run a kernel on each block of flat arrays: compiled for a TPU, interpreted elsewhere.

    Args:
      kernel: called with a reference to each array's block, to the scalars, and to each result's
        block.
      size: of each array and each result.
      elements: of a block.
      arrays: the flat operands, which vary along the same mesh axes.
      scalars: a flat array that every block reads.
      dtypes: of the results.
      aliases: operand number -> number of the result that takes its memory.

    Returns:
      The results, flat.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    compiled = registry.current_device()[0] == "tpu"
    block = pl.BlockSpec((min(elements, size),), lambda i: (i,))

    def run_blocks(*operands: jax.Array) -> list[jax.Array]:
        return pl.pallas_call(  # type: ignore[no-any-return]
            kernel,
            [_compat.shape_like(operands[0], (size,), dtype) for dtype in dtypes],
            grid=(-(-size // elements),),
            in_specs=[*[block] * len(arrays), pl.BlockSpec(memory_space=tpu.SMEM)],
            out_specs=[block] * len(dtypes),
            input_output_aliases=dict(aliases),
            interpret=not compiled,
            compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",)),
        )(*operands)

    operands = (*arrays, scalars)
    return run_blocks(*operands) if compiled else varying.run_untracked(run_blocks, *operands)  # type: ignore[no-any-return]
