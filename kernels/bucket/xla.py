"""Packing in XLA's own ops."""

from math import prod

import jax
import jax.numpy as jnp
from jax import lax


def pack(*operands: jax.Array, config: None, dtype: str, scaled: bool) -> jax.Array:
    """Compute the op of `txcore.kernels.pack` on checked leaves, and the scale behind them."""
    leaves, scale = (operands[:-1], operands[-1:]) if scaled else (operands, ())
    return jnp.concatenate([scale_and_cast(leaf.reshape(-1), dtype, *scale) for leaf in leaves])


def unpack(
    flat: jax.Array,
    *scale: jax.Array,
    config: None,
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[str, ...],
) -> list[jax.Array]:
    """Compute the op of `txcore.kernels.unpack` on a checked buffer."""
    # One split has one concatenate as its transpose; slices would have a pad each, and a sum.
    parts = lax.split(flat, [prod(shape) for shape in shapes])
    return [
        scale_and_cast(part.reshape(shape), dtype, *scale)
        for part, shape, dtype in zip(parts, shapes, dtypes, strict=True)
    ]


def scale_and_cast(x: jax.Array, dtype: str, *scale: jax.Array) -> jax.Array:
    """Multiply by the scale, if there is one, in the scale's wide dtype, and cast."""
    return (x.astype(scale[0].dtype) * scale[0] if scale else x).astype(dtype)
