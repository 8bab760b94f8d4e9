"""The updates in one Pallas kernel over blocks of a flat array: interpreted, or on a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from txcore.kernels.common import pallas_tiles
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.optimizer import equations


@dataclass(frozen=True)
class Config:
    """Hold how many elements one program updates (a power of two), and a GPU's warps for it."""

    elements: int
    warps: int = 4


def configs(problem: Problem) -> Sequence[Config]:
    """Return the blocks worth trying, the best guess first."""
    if problem.platform != "gpu":  # an interpreter's time goes by the number of programs
        return Config(65536), Config(1024)
    return Config(1024), Config(2048), Config(4096, warps=8)


def sgd_momentum(
    *operands: jax.Array, config: Config, dtypes: tuple[str, ...], **options: Any
) -> tuple[jax.Array, ...]:
    """Compute the op of `txcore.kernels.sgd_momentum` on checked operands."""
    return _update(
        partial(equations.sgd_momentum, **options), operands[:3], operands[3:], dtypes, config
    )


def adamw(
    *operands: jax.Array, config: Config, dtypes: tuple[str, ...], **options: Any
) -> tuple[jax.Array, ...]:
    """Compute the op of `txcore.kernels.adamw` on checked operands."""
    equation = partial(equations.adamw, **options)
    return _update(equation, operands[:4], operands[4:], dtypes, config)


def _update(
    equation: Callable[..., tuple[jax.Array, ...]],
    arrays: tuple[jax.Array, ...],
    scalars: tuple[jax.Array, ...],
    dtypes: tuple[str, ...],
    config: Config,
) -> tuple[jax.Array, ...]:
    shape, size, wide = arrays[0].shape, arrays[0].size, scalars[0].dtype
    columns = pallas_tiles.block(size, config.elements)

    def kernel(*refs: Any) -> None:
        inputs, outputs = refs[: -len(dtypes)], refs[-len(dtypes) :]
        new, *moments = equation(*(ref[...].astype(wide) for ref in inputs))
        copies = [new] * (len(outputs) - len(moments) - 1)
        for ref, result in zip(outputs, (new, *moments, *copies), strict=True):
            ref[...] = result.astype(ref.dtype)

    block = pallas_tiles.row(columns)
    flat = [pallas_tiles.pad(x.reshape(1, -1), 1, columns) for x in arrays]
    padded = flat[0].shape
    results = pallas_tiles.call(
        kernel,
        (1, padded[1] // columns),
        [(x, block) for x in flat] + [(x.reshape(1, 1), pallas_tiles.SCALAR) for x in scalars],
        [(padded, dtype, block) for dtype in dtypes],
        warps=config.warps,
    )
    return tuple(x.reshape(-1)[:size].reshape(shape) for x in results)
