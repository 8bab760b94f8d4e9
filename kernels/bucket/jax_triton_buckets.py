"""Packing by kernels in Triton's language, 32 arrays of one dtype in a launch: only on GPUs."""

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import jax
import jax.numpy as jnp

from txcore.kernels.bucket.derivatives import Dtypes, Shapes, make_buckets
from txcore.kernels.bucket.pallas import Config
from txcore.kernels.bucket.triton import group_launches
from txcore.kernels.common import jax_triton_calls
from txcore.kernels.dispatch.problem import Problem

Table = tuple[tuple[int, int, int], ...]


def list_configs(problem: Problem) -> Sequence[Config]:
    """Return the runs worth trying, the best guess first."""
    return Config(2048), Config(1024), Config(4096, warps=8)


def refuse_pack(problem: Problem) -> str | None:
    """Return why the kernel cannot pack these leaves, or None."""
    size = sum(map(prod, problem.shapes))
    return jax_triton_calls.explain_refusal(problem, problem.get_option("dtype"), sizes=[size])


def refuse_unpack(problem: Problem) -> str | None:
    """Return why the kernel cannot unpack this buffer, or None."""
    return jax_triton_calls.explain_refusal(problem, *problem.get_option("dtypes"))


def _pack_leaves(
    leaves: tuple[jax.Array, ...], scale: tuple[jax.Array, ...], dtype: str, config: Config
) -> jax.Array:
    from txcore.kernels.bucket import triton_buckets

    sizes, buffer = [leaf.size for leaf in leaves], None
    most = triton_buckets.ARRAYS
    for some in group_launches(sizes, [str(leaf.dtype) for leaf in leaves], most):
        arrays = [leaves[i] for i in some]
        table, programs = _tabulate_runs(sizes, some, config.elements)
        (buffer,) = jax_triton_calls.call_kernel(
            triton_buckets.pack,
            (programs,),
            [(sum(sizes), dtype)],
            # What a kernel does not read is any operand: without a scale, before there is a buffer.
            *(*arrays, *[arrays[0]] * (most - len(some))),
            *(scale or arrays[:1]),
            arrays[0] if buffer is None else buffer,
            warps=config.warps,
            aliases={} if buffer is None else {most + 1: 0},
            table=table,
            elements=config.elements,
            scaled=bool(scale),
        )
    return jnp.zeros(0, dtype) if buffer is None else buffer


def _unpack_buffer(
    flat: jax.Array, scale: tuple[jax.Array, ...], shapes: Shapes, dtypes: Dtypes, config: Config
) -> list[jax.Array]:
    from txcore.kernels.bucket import triton_buckets

    sizes, most = [prod(shape) for shape in shapes], triton_buckets.ARRAYS
    made = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    for some in group_launches(sizes, dtypes, most):
        table, programs = _tabulate_runs(sizes, some, config.elements)
        results = jax_triton_calls.call_kernel(
            triton_buckets.unpack,
            (programs,),
            # The results that nothing is written to have one element.
            [
                (size, dtypes[some[0]])
                for size in [sizes[i] for i in some] + [1] * (most - len(some))
            ],
            flat,
            *(scale or (flat,)),
            warps=config.warps,
            table=table,
            elements=config.elements,
            scaled=bool(scale),
        )
        for i, array in zip(some, results, strict=False):
            made[i] = array.reshape(shapes[i])
    return made


def _tabulate_runs(sizes: Sequence[int], some: Sequence[int], elements: int) -> tuple[Table, int]:
    """Return (first program, start in the buffer, size) of some arrays, and all their programs."""
    starts = [0, *accumulate(sizes)]
    firsts = [0, *accumulate(-(-sizes[i] // elements) for i in some)]
    table = tuple((first, starts[i], sizes[i]) for first, i in zip(firsts, some, strict=False))
    return table, firsts[-1]


pack, unpack = make_buckets(_pack_leaves, _unpack_buffer)
