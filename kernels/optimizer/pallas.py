"""The updates in one Pallas kernel over blocks of a flat array: interpreted, or on a GPU."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from txcore.kernels.common import pallas_masked as masked
from txcore.kernels.common import pallas_tiles
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.optimizer import equations
from txcore.kernels.optimizer.results import aliases_of, make_update, order_results


@dataclass(frozen=True)
class Config:
    """Hold how many elements one program updates (a power of two), and a GPU's warps for it."""

    elements: int
    warps: int = 4


def list_configs(problem: Problem) -> Sequence[Config]:
    """Return the blocks worth trying, the best guess first."""
    if problem.platform != "gpu":  # an interpreter's time goes by the number of programs
        return Config(65536), Config(1024)
    return Config(1024), Config(2048), Config(4096, warps=8)


def explain_refusal(problem: Problem) -> str | None:
    """Return why the kernel cannot update this array, or None."""
    return masked.explain_too_large(math.prod(problem.shapes[0]))


def _update_arrays(
    equation: Callable[..., tuple[jax.Array, ...]],
    arrays: tuple[jax.Array, ...],
    scalars: tuple[jax.Array, ...],
    dtypes: tuple[str, ...],
    config: Config,
) -> tuple[jax.Array, ...]:
    from jax.experimental import pallas as pl

    shape, size, wide = arrays[0].shape, arrays[0].size, scalars[0].dtype
    if not size:
        return tuple(jnp.zeros(shape, dtype) for dtype in dtypes)
    elements = pallas_tiles.block_size(size, config.elements)

    def kernel(*refs: Any) -> None:
        inputs, outputs = refs[: -len(dtypes)], refs[-len(dtypes) :]
        program, whole = pl.program_id(0), size // elements

        def update_run(inside: Callable[[jax.Array], jax.Array | None]) -> None:
            place = masked.count_from(program * elements, elements)
            known = [masked.load(ref, place, inside(place)) for ref in inputs[: len(arrays)]]
            rest = [ref[...] for ref in inputs[len(arrays) :]]
            results = equation(*(x.astype(wide) for x in known), *rest)
            for ref, result in zip(outputs, order_results(results, len(outputs)), strict=True):
                masked.store(ref, place, result, inside(place))

        if whole:  # full runs without a mask: with one, a GPU cannot load 16 bytes at a time
            pl.when(program < whole)(lambda: update_run(lambda place: None))
        if size % elements:
            pl.when(program == whole)(lambda: update_run(lambda place: place < size))

    results = masked.call_kernel(
        kernel,
        (-(-size // elements),),
        [(size, dtype) for dtype in dtypes],
        *arrays,
        *scalars,
        warps=config.warps,
        aliases=aliases_of(len(arrays)),
    )
    return tuple(x.reshape(shape) for x in results)


sgd_momentum = make_update(_update_arrays, equations.sgd_momentum, 3)
adamw = make_update(_update_arrays, equations.adamw, 4)
