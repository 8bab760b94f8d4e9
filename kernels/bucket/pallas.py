"""Packing in Pallas kernels that copy up to 16 arrays each: interpreted, or on a GPU.

A program copies one run of elements of one array. It finds its array by its program number: a
binary tree of comparisons leads to the code that copies that array.
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
from txcore.kernels.bucket.derivatives import Dtypes, Shapes, make_buckets
from txcore.kernels.common import pallas_masked as masked
from txcore.kernels.dispatch.problem import Problem

ARRAYS = 16  # at most, in one kernel: Triton takes two minutes to compile one for 200


@dataclass(frozen=True)
class Config:
    """Hold how many elements one program copies (a power of two), and a GPU's warps for it."""

    elements: int
    warps: int = 4


def list_configs(problem: Problem) -> Sequence[Config]:
    """Return the runs worth trying, the best guess first."""
    if problem.platform != "gpu":  # an interpreter's time goes by the number of programs
        return Config(65536), Config(1024)
    return (Config(2048),)


def refuse_pack(problem: Problem) -> str | None:
    """Return why the kernels cannot pack these leaves, or None."""
    return masked.explain_too_large(sum(map(math.prod, problem.shapes)))


def refuse_unpack(problem: Problem) -> str | None:
    """Return why the kernels cannot unpack this buffer, or None."""
    return masked.explain_too_large(math.prod(problem.shapes[0]))


class _Part(NamedTuple):
    """Hold an array's part of the buffer, and where its programs start in its kernel's grid."""

    array: int
    start: int
    size: int
    program: int  # the first of those that copy it


def _divide_among_kernels(sizes: Sequence[int], elements: int) -> Iterator[tuple[list[_Part], int]]:
    """Yield the parts that each kernel copies, and the number of its programs."""
    starts = [0, *accumulate(sizes)]
    filled = [i for i, size in enumerate(sizes) if size]
    for first in range(0, len(filled), ARRAYS):
        parts, programs = [], 0
        for i in filled[first : first + ARRAYS]:
            parts.append(_Part(i, starts[i], sizes[i], programs))
            programs += -(-sizes[i] // elements)
        yield parts, programs


def _call_on_own_part(parts: Sequence[_Part], program: Any, copy: Callable[[int], None]) -> None:
    """Call `copy` with the number of the part that this program copies."""

    def find_part(low: int, high: int) -> None:
        if high - low == 1:
            copy(low)
            return
        middle = (low + high) // 2
        lax.cond(
            program < parts[middle].program,
            lambda: find_part(low, middle),
            lambda: find_part(middle, high),
        )

    find_part(0, len(parts))


def _places_of_run(
    part: _Part, program: Any, elements: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return a program's indices into its array and into the buffer, and which are inside."""
    first = (program - part.program) * elements
    place = masked.count_from(first, elements)
    inside = place < part.size if part.size % elements else None
    return place, masked.count_from(first + part.start, elements), inside


def _pack_leaves(
    leaves: tuple[jax.Array, ...], scale: tuple[jax.Array, ...], dtype: str, config: Config
) -> jax.Array:
    sizes = [leaf.size for leaf in leaves]
    buffer: list[jax.Array] = []
    for parts, programs in _divide_among_kernels(sizes, config.elements):

        def kernel(*refs: Any, parts: list[_Part] = parts) -> None:
            from jax.experimental import pallas as pl

            program, scalar = (
                pl.program_id(0),
                [ref[...] for ref in refs[len(parts) :][: len(scale)]],
            )

            def copy_run(number: int) -> None:
                place, target, inside = _places_of_run(parts[number], program, config.elements)
                value = masked.load(refs[number], place, inside)
                masked.store(refs[-1], target, xla.scale_and_cast(value, dtype, *scalar), inside)

            _call_on_own_part(parts, program, copy_run)

        operands = [*(leaves[part.array] for part in parts), *scale, *buffer]
        buffer = masked.call_kernel(
            kernel,
            (programs,),
            [(sum(sizes), dtype)],
            *operands,
            warps=config.warps,
            # Each further kernel fills more of the same buffer, which is its last operand.
            aliases={len(operands) - 1: 0} if buffer else {},
        )
    return buffer[0] if buffer else jnp.zeros(0, dtype)


def _unpack_buffer(
    flat: jax.Array, scale: tuple[jax.Array, ...], shapes: Shapes, dtypes: Dtypes, config: Config
) -> list[jax.Array]:
    arrays = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    for parts, programs in _divide_among_kernels(
        [math.prod(shape) for shape in shapes], config.elements
    ):

        def kernel(*refs: Any, parts: list[_Part] = parts) -> None:
            from jax.experimental import pallas as pl

            program, scalar = pl.program_id(0), [ref[...] for ref in refs[1:][: len(scale)]]
            out_refs = refs[1 + len(scale) :]

            def copy_run(number: int) -> None:
                place, source, inside = _places_of_run(parts[number], program, config.elements)
                value = masked.load(refs[0], source, inside)
                out_ref = out_refs[number]
                masked.store(
                    out_ref, place, xla.scale_and_cast(value, str(out_ref.dtype), *scalar), inside
                )

            _call_on_own_part(parts, program, copy_run)

        results = [(part.size, dtypes[part.array]) for part in parts]
        made = masked.call_kernel(kernel, (programs,), results, flat, *scale, warps=config.warps)
        for part, array in zip(parts, made, strict=True):
            arrays[part.array] = array.reshape(shapes[part.array])
    return arrays


pack, unpack = make_buckets(_pack_leaves, _unpack_buffer)
