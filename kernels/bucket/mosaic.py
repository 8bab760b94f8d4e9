"""Packing in one Pallas kernel for TPUs: interpreted elsewhere.

A TPU's memory is copied in whole tiles of 1024 elements, and an array begins anywhere in the
buffer. So pieces of the arrays pass vector memory: there they are turned by their place in a tile,
scaled and cast. The next piece arrives and the last one leaves meanwhile. What does not fill a
tile at an array's end has a scratch array of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from txcore import _compat, varying
from txcore.kernels.bucket import mosaic_kernels
from txcore.kernels.bucket.derivatives import Dtypes, Shapes, make_buckets
from txcore.kernels.bucket.mosaic_copies import TILE
from txcore.kernels.common import checks, mosaic_blocks
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem


@dataclass(frozen=True)
class Config:
    """Hold how many elements pass a TPU's vector memory at a time, a multiple of 1024."""

    elements: int

    def __post_init__(self) -> None:
        if not isinstance(self.elements, int) or self.elements < TILE or self.elements % TILE:
            raise ValueError(
                f"Config: elements needs a multiple of {TILE}, got {self.elements!r}: pass "
                f"Config({TILE * 32}), or leave config out"
            )


def list_configs(problem: Problem) -> Sequence[Config]:
    """Return the pieces worth trying, the best guess first."""
    return Config(32 * TILE), Config(64 * TILE), Config(16 * TILE)


def refuse_pack(problem: Problem) -> str | None:
    """Return why the kernel cannot pack these leaves, or None."""
    return mosaic_blocks.explain_refusal(problem, problem.get_option("dtype"))


def refuse_unpack(problem: Problem) -> str | None:
    """Return why the kernel cannot unpack this buffer, or None."""
    return mosaic_blocks.explain_refusal(problem, *problem.get_option("dtypes"))


def _pack_leaves(
    leaves: tuple[jax.Array, ...], scale: tuple[jax.Array, ...], dtype: str, config: Config
) -> jax.Array:
    filled = [leaf.reshape(-1) for leaf in leaves if leaf.size]
    size = sum(leaf.size for leaf in filled)
    if not filled:
        return jnp.zeros(0, dtype)
    starts = list(accumulate((leaf.size for leaf in filled), initial=0))
    wide = _wide_dtype(scale, dtype, *(leaf.dtype for leaf in filled))
    sizes = tuple(leaf.size for leaf in filled)
    layout = mosaic_kernels.Layout(tuple(starts[:-1]), sizes, config.elements)
    (out,) = _call_kernel(
        partial(mosaic_kernels.pack, layout),
        partial(mosaic_kernels.list_pack_scratch, layout),
        *(filled, scale, [(size, jnp.dtype(dtype))], wide),
    )
    return out


def _unpack_buffer(
    flat: jax.Array, scale: tuple[jax.Array, ...], shapes: Shapes, dtypes: Dtypes, config: Config
) -> list[jax.Array]:
    arrays = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    filled = [i for i, shape in enumerate(shapes) if prod(shape)]
    if not filled:
        return arrays
    sizes = [prod(shapes[i]) for i in filled]
    starts = list(accumulate(sizes, initial=0))
    layout = mosaic_kernels.Layout(tuple(starts[:-1]), tuple(sizes), config.elements)
    results = [(prod(shapes[i]), jnp.dtype(dtypes[i])) for i in filled]
    wide = _wide_dtype(scale, flat.dtype, *(dtype for _, dtype in results))
    made = _call_kernel(
        partial(mosaic_kernels.unpack, layout),
        partial(mosaic_kernels.list_unpack_scratch, layout),
        *([flat], scale, results, wide),
    )
    for i, array in zip(filled, made, strict=True):
        arrays[i] = array.reshape(shapes[i])
    return arrays


def _wide_dtype(scale: tuple[jax.Array, ...], *dtypes: Any) -> jnp.dtype:
    """Return the dtype in which elements are turned and scaled: the scale's, which is wide."""
    return scale[0].dtype if scale else checks.accumulator(checks.common_dtype(*dtypes))


def _call_kernel(
    copy: Callable[..., None],
    list_scratch: Callable[..., Sequence[Any]],
    arrays: Sequence[jax.Array],
    scale: tuple[jax.Array, ...],
    results: Sequence[tuple[int, jnp.dtype]],
    wide: jnp.dtype,
) -> list[jax.Array]:
    """Run a copy once, with references to whole flat arrays: compiled for a TPU, or interpreted."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    compiled = registry.current_device()[0] == "tpu"
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    dtypes = [array.dtype for array in arrays], [dtype for _, dtype in results]

    def kernel(*refs: Any) -> None:
        sources, rest = refs[: len(arrays)], refs[len(arrays) :]
        scalar, rest = rest[: len(scale)], rest[len(scale) :]
        targets, scratch = rest[: len(results)], rest[len(results) :]

        def convert(x: jax.Array) -> jax.Array:
            x = x.astype(wide)
            return x * scalar[0][0] if scalar else x

        copy(sources, targets, list(scratch), convert)

    def run(*operands: jax.Array) -> list[jax.Array]:
        return pl.pallas_call(  # type: ignore[no-any-return]
            kernel,
            [_compat.shape_like(operands[0], (size,), dtype) for size, dtype in results],
            in_specs=[
                *[anywhere] * len(arrays),
                *[pl.BlockSpec(memory_space=tpu.SMEM)] * len(scale),
            ],
            out_specs=[anywhere] * len(results),
            scratch_shapes=list(list_scratch(*dtypes, wide)),
            interpret=not compiled,
        )(*operands)

    operands = (*arrays, *(x.reshape(1) for x in scale))
    return run(*operands) if compiled else varying.run_untracked(run, *operands)  # type: ignore[no-any-return]


pack, unpack = make_buckets(_pack_leaves, _unpack_buffer)
