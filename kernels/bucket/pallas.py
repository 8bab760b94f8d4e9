"""Packing in one Pallas kernel each way, interpreted."""

from functools import partial
from math import prod
from typing import Any

import jax

from txcore import _compat, varying
from txcore.kernels.bucket import xla
from txcore.kernels.dispatch.problem import Problem

Shapes = tuple[tuple[int, ...], ...]
Dtypes = tuple[str, ...]


def refuse_pack(problem: Problem) -> str | None:
    """Return why leaves cannot be packed, if so."""
    return _refuse(problem, problem.shapes)


def refuse_unpack(problem: Problem) -> str | None:
    """Return why a buffer cannot be unpacked, if so."""
    return _refuse(problem, problem.option("shapes"))


def _refuse(problem: Problem, shapes: Shapes) -> str | None:
    if problem.platform != "cpu":
        return "its kernel holds arrays of any size at any offset, and no device compiles that"
    return "an array has no elements" if any(0 in shape for shape in shapes) else None


def pack(*operands: jax.Array, config: None, dtype: str, scaled: bool) -> jax.Array:
    """Compute the op of `txcore.kernels.pack` on checked leaves, and the scale behind them."""
    leaves, scale = (operands[:-1], operands[-1:]) if scaled else (operands, ())
    return _pack(leaves, scale, dtype)


def unpack(
    flat: jax.Array, *scale: jax.Array, config: None, shapes: Shapes, dtypes: Dtypes
) -> list[jax.Array]:
    """Compute the op of `txcore.kernels.unpack` on a checked buffer."""
    return _unpack(flat, scale, shapes, dtypes)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pack(leaves: tuple[jax.Array, ...], scale: tuple[jax.Array, ...], dtype: str) -> jax.Array:
    from jax.experimental import pallas as pl

    sizes = [leaf.size for leaf in leaves]

    def kernel(*refs: Any) -> None:
        scalar = [ref[0] for ref in refs[len(sizes) : -1]]
        for ref, part in zip(refs, _parts(sizes), strict=False):
            refs[-1][pl.ds(*part)] = xla.convert(ref[...], dtype, *scalar)

    def run(*flat: jax.Array) -> jax.Array:
        out = _compat.shape_like(flat[0], (sum(sizes),), dtype)
        return pl.pallas_call(kernel, out, interpret=True)(*flat)  # type: ignore[no-any-return]

    return varying.run_untracked(run, *(x.reshape(-1) for x in (*leaves, *scale)))  # type: ignore[no-any-return]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _unpack(
    flat: jax.Array, scale: tuple[jax.Array, ...], shapes: Shapes, dtypes: Dtypes
) -> list[jax.Array]:
    from jax.experimental import pallas as pl

    sizes = [prod(shape) for shape in shapes]

    def kernel(flat_ref: Any, *refs: Any) -> None:
        scalar = [ref[0] for ref in refs[: -len(sizes)]]
        for ref, part in zip(refs[-len(sizes) :], _parts(sizes), strict=True):
            ref[...] = xla.convert(flat_ref[pl.ds(*part)], str(ref.dtype), *scalar)

    def run(flat: jax.Array, *scale: jax.Array) -> list[jax.Array]:
        outs = [
            _compat.shape_like(flat, (size,), dtype)
            for size, dtype in zip(sizes, dtypes, strict=True)
        ]
        return pl.pallas_call(kernel, outs, interpret=True)(flat, *scale)  # type: ignore[no-any-return]

    arrays = varying.run_untracked(run, flat, *(x.reshape(-1) for x in scale))
    return [array.reshape(shape) for array, shape in zip(arrays, shapes, strict=True)]


def _parts(sizes: list[int]) -> list[tuple[int, int]]:
    """Return the start and the size of each array's part of the buffer."""
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _pack_forward(
    leaves: tuple[jax.Array, ...], scale: tuple[jax.Array, ...], dtype: str
) -> tuple[jax.Array, Any]:
    return _pack(leaves, scale, dtype), (leaves, scale)


def _pack_backward(dtype: str, residuals: Any, g: jax.Array) -> tuple[Any, None]:
    leaves, scale = residuals
    shapes = tuple(leaf.shape for leaf in leaves)
    return tuple(_unpack(g, scale, shapes, tuple(str(leaf.dtype) for leaf in leaves))), None


def _unpack_forward(
    flat: jax.Array, scale: tuple[jax.Array, ...], shapes: Shapes, dtypes: Dtypes
) -> tuple[list[jax.Array], Any]:
    return _unpack(flat, scale, shapes, dtypes), (flat, scale)


def _unpack_backward(
    shapes: Shapes, dtypes: Dtypes, residuals: Any, g: list[jax.Array]
) -> tuple[jax.Array, None]:
    flat, scale = residuals
    return _pack(tuple(g), scale, str(flat.dtype)), None


_pack.defvjp(_pack_forward, _pack_backward)
_unpack.defvjp(_unpack_forward, _unpack_backward)
