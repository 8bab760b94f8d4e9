"""The updates by kernels in Triton's language: one launch, in place."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from txcore.kernels.common import jax_triton_calls, pallas_tiles
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.optimizer.pallas import Config
from txcore.kernels.optimizer.results import aliases_of


def list_configs(problem: Problem) -> Sequence[Config]:
    """Return the runs worth trying, the best guess first."""
    return Config(1024), Config(2048), Config(4096, warps=8)


def explain_refusal(problem: Problem) -> str | None:
    """Return why the kernel cannot update this array, or None."""
    return jax_triton_calls.explain_refusal(problem, *problem.get_option("dtypes"))


def sgd_momentum(
    *operands: jax.Array, config: Config, dtypes: tuple[str, ...], **options: Any
) -> tuple[jax.Array, ...]:
    """Compute the op of `txcore.kernels.sgd_momentum` on checked operands."""
    return _update_arrays("sgd_momentum", operands, 3, dtypes, config, options)


def adamw(
    *operands: jax.Array, config: Config, dtypes: tuple[str, ...], **options: Any
) -> tuple[jax.Array, ...]:
    """Compute the op of `txcore.kernels.adamw` on checked operands."""
    return _update_arrays("adamw", operands, 4, dtypes, config, options)


def _update_arrays(
    name: str,
    operands: tuple[jax.Array, ...],
    count: int,
    dtypes: tuple[str, ...],
    config: Config,
    options: dict[str, Any],
) -> tuple[jax.Array, ...]:
    from txcore.kernels.optimizer import triton_updates

    shape, size = operands[0].shape, operands[0].size
    if not size:
        return tuple(jnp.zeros(shape, dtype) for dtype in dtypes)
    elements = pallas_tiles.block_size(size, config.elements)
    no_copy: dict[str, Any] = {} if len(dtypes) == count else {"copy_ptr": None}
    results = jax_triton_calls.call_kernel(
        getattr(triton_updates, name),
        (-(-size // elements),),
        [(size, dtype) for dtype in dtypes],
        *operands,
        warps=config.warps,
        aliases=aliases_of(count),
        size=size,
        elements=elements,
        **no_copy,
        **options,
    )
    return tuple(x.reshape(shape) for x in results)
