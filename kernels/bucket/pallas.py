"""Packing in Pallas kernels that copy up to 16 arrays each: interpreted, or on a GPU.

A program copies one run of elements of one array. Which array that is, its number tells: a tree
of comparisons, as deep as the logarithm of the number of arrays, leads to the array's own code.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from txcore.kernels.bucket import xla
from txcore.kernels.bucket.derivatives import Dtypes, Shapes, differentiate_buckets
from txcore.kernels.common import pallas_masked as masked
from txcore.kernels.dispatch.problem import Problem

ARRAYS = 16  # of one kernel: 200 take Triton's compiler two minutes


@dataclass(frozen=True)
class Config:
    """Hold how many elements one program copies (a power of two), and a GPU's warps for it."""

    elements: int
    warps: int = 4


def configs(problem: Problem) -> Sequence[Config]:
    """Return the runs worth trying, the best guess first."""
    if problem.platform != "gpu":  # an interpreter's time goes by the number of programs
        return Config(65536), Config(1024)
    return (Config(2048),)


def refuse_pack(problem: Problem) -> str | None:
    """Return why leaves cannot be packed, if so."""
    return masked.too_large(sum(map(math.prod, problem.shapes)))


def refuse_unpack(problem: Problem) -> str | None:
    """Return why a buffer cannot be unpacked, if so."""
    return masked.too_large(math.prod(problem.shapes[0]))


def pack(*operands: jax.Array, config: Config, dtype: str, scaled: bool) -> jax.Array:
    """Compute the op of `txcore.kernels.pack` on checked leaves, and the scale behind them."""
    leaves, scale = (operands[:-1], operands[-1:]) if scaled else (operands, ())
    return _differentiable_pack(leaves, scale, dtype, config)


def unpack(
    flat: jax.Array, *scale: jax.Array, config: Config, shapes: Shapes, dtypes: Dtypes
) -> list[jax.Array]:
    """Compute the op of `txcore.kernels.unpack` on a checked buffer."""
    return _differentiable_unpack(flat, scale, shapes, dtypes, config)


class _Part(NamedTuple):
    """Hold which part of the buffer an array is, and which programs of its kernel copy it."""

    array: int
    start: int
    size: int
    program: int  # the first one


def _kernels(sizes: Sequence[int], elements: int) -> Iterator[tuple[list[_Part], int]]:
    """Yield the parts that each kernel copies, and the number of its programs."""
    starts = [0, *accumulate(sizes)]
    filled = [i for i, size in enumerate(sizes) if size]
    for first in range(0, len(filled), ARRAYS):
        parts, programs = [], 0
        for i in filled[first : first + ARRAYS]:
            parts.append(_Part(i, starts[i], sizes[i], programs))
            programs += -(-sizes[i] // elements)
        yield parts, programs


def _on_own_part(parts: Sequence[_Part], program: Any, copy: Callable[[int], None]) -> None:
    """Call `copy` with the number of the part that a program belongs to."""

    def descend(low: int, high: int) -> None:
        if high - low == 1:
            copy(low)
            return
        middle = (low + high) // 2
        lax.cond(
            program < parts[middle].program,
            lambda: descend(low, middle),
            lambda: descend(middle, high),
        )

    descend(0, len(parts))


def _run_of(
    part: _Part, program: Any, elements: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return a program's places in its array and in the buffer, and which of them there are."""
    first = (program - part.program) * elements
    place = masked.numbers(first, elements)
    inside = place < part.size if part.size % elements else None
    return place, masked.numbers(first + part.start, elements), inside


def _pack(
    leaves: tuple[jax.Array, ...], scale: tuple[jax.Array, ...], dtype: str, config: Config
) -> jax.Array:
    sizes = [leaf.size for leaf in leaves]
    buffer: list[jax.Array] = []
    for parts, programs in _kernels(sizes, config.elements):

        def kernel(*refs: Any, parts: list[_Part] = parts) -> None:
            from jax.experimental import pallas as pl

            program, scalar = (
                pl.program_id(0),
                [ref[...] for ref in refs[len(parts) :][: len(scale)]],
            )

            def copy(number: int) -> None:
                place, target, inside = _run_of(parts[number], program, config.elements)
                value = masked.load(refs[number], place, inside)
                masked.store(refs[-1], target, xla.convert(value, dtype, *scalar), inside)

            _on_own_part(parts, program, copy)

        operands = [*(leaves[part.array] for part in parts), *scale, *buffer]
        buffer = masked.call(
            kernel,
            (programs,),
            [(sum(sizes), dtype)],
            *operands,
            warps=config.warps,
            aliases={len(operands) - 1: 0} if buffer else {},  # the next kernel fills more of it
        )
    return buffer[0] if buffer else jnp.zeros(0, dtype)


def _unpack(
    flat: jax.Array, scale: tuple[jax.Array, ...], shapes: Shapes, dtypes: Dtypes, config: Config
) -> list[jax.Array]:
    arrays = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    for parts, programs in _kernels([math.prod(shape) for shape in shapes], config.elements):

        def kernel(*refs: Any, parts: list[_Part] = parts) -> None:
            from jax.experimental import pallas as pl

            program, scalar = pl.program_id(0), [ref[...] for ref in refs[1:][: len(scale)]]
            out_refs = refs[1 + len(scale) :]

            def copy(number: int) -> None:
                place, source, inside = _run_of(parts[number], program, config.elements)
                value = masked.load(refs[0], source, inside)
                out_ref = out_refs[number]
                masked.store(
                    out_ref, place, xla.convert(value, str(out_ref.dtype), *scalar), inside
                )

            _on_own_part(parts, program, copy)

        results = [(part.size, dtypes[part.array]) for part in parts]
        made = masked.call(kernel, (programs,), results, flat, *scale, warps=config.warps)
        for part, array in zip(parts, made, strict=True):
            arrays[part.array] = array.reshape(shapes[part.array])
    return arrays


_differentiable_pack, _differentiable_unpack = differentiate_buckets(_pack, _unpack)
