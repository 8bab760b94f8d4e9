"""The updates in one Pallas kernel for TPUs, over blocks of a flat array: interpreted elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from txcore.kernels.common import mosaic_blocks
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.optimizer import equations
from txcore.kernels.optimizer.results import aliases_of, make_update, order_results


@dataclass(frozen=True)
class Config:
    """Hold how many elements of each array lie in a TPU's vector memory at a time."""

    elements: int


def list_configs(problem: Problem) -> Sequence[Config]:
    """Return the blocks worth trying, the best guess first."""
    return Config(65536), Config(131072), Config(32768)


def explain_refusal(problem: Problem) -> str | None:
    """Return why the kernel cannot update this array, or None."""
    return mosaic_blocks.explain_refusal(problem, *problem.get_option("dtypes"))


def _update_arrays(
    equation: Callable[..., tuple[jax.Array, ...]],
    arrays: tuple[jax.Array, ...],
    scalars: tuple[jax.Array, ...],
    dtypes: tuple[str, ...],
    config: Config,
) -> tuple[jax.Array, ...]:
    shape, size, wide = arrays[0].shape, arrays[0].size, scalars[0].dtype
    if not size:
        return tuple(jnp.zeros(shape, dtype) for dtype in dtypes)
    count = len(arrays)

    def kernel(*refs: Any) -> None:
        inputs, scalar_ref, outputs = refs[:count], refs[count], refs[count + 1 :]
        known = (ref[...].astype(wide) for ref in inputs)
        results = equation(*known, *(scalar_ref[i] for i in range(len(scalars))))
        for ref, result in zip(outputs, order_results(results, len(outputs)), strict=True):
            ref[...] = result.astype(ref.dtype)

    results = mosaic_blocks.call_kernel(
        kernel,
        size,
        config.elements,
        [x.reshape(-1) for x in arrays],
        jnp.stack(scalars),
        dtypes,
        aliases=aliases_of(count),
    )
    return tuple(x.reshape(shape) for x in results)


sgd_momentum = make_update(_update_arrays, equations.sgd_momentum, 3)
adamw = make_update(_update_arrays, equations.adamw, 4)
