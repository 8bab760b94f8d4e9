"""The sum of squares in one Pallas kernel for TPUs, which adds one block after another."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from txcore import _compat, varying
from txcore.kernels.common import checks
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.optimizer.mosaic import Config

TILE = 1024  # elements of a flat array that lie together in a TPU's memory


def list_configs(problem: Problem) -> Sequence[Config]:
    """Return the blocks worth trying, the best guess first."""
    return Config(262144), Config(65536), Config(524288)


def sum_squares(x: jax.Array, config: Config) -> jax.Array:
    """Return the sum of an array's squares; what is left over after whole blocks is XLA's."""
    flat, dtype = x.reshape(-1), checks.accumulator(x.dtype)
    elements = min(config.elements, flat.size // TILE * TILE)
    blocks = flat.size // elements if elements else 0
    rest = jnp.sum(jnp.square(flat[blocks * elements :].astype(dtype)))
    return rest + _sum_blocks(flat, blocks, elements, dtype) if blocks else rest


def _sum_blocks(flat: jax.Array, blocks: int, elements: int, dtype: jnp.dtype) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    def kernel(x_ref: Any, sum_ref: Any) -> None:
        total = jnp.sum(jnp.square(x_ref[...].astype(dtype)))
        first = pl.program_id(0) == 0
        sum_ref[0, 0] = total + jnp.where(first, jnp.zeros_like(total), sum_ref[0, 0])

    compiled = registry.current_device()[0] == "tpu"

    def run_blocks(flat: jax.Array) -> jax.Array:
        return pl.pallas_call(  # type: ignore[no-any-return]
            kernel,
            _compat.shape_like(flat, (1, 1), dtype),
            grid=(blocks,),
            in_specs=[pl.BlockSpec((elements,), lambda i: (i,))],
            out_specs=pl.BlockSpec((1, 1), lambda i: (0, 0), memory_space=tpu.SMEM),
            interpret=not compiled,
            compiler_params=tpu.CompilerParams(dimension_semantics=("arbitrary",)),
        )(flat)

    out = run_blocks(flat) if compiled else varying.run_untracked(run_blocks, flat)
    return out[0, 0]
