"""Packing in XLA's own ops."""

from math import prod

import jax
import jax.numpy as jnp
from jax import lax


def pack(*operands: jax.Array, config: None, dtype: str, scaled: bool) -> jax.Array:
    """Compute the op of `txcore.kernels.pack` on checked leaves, and the scale behind them."""
    leaves, scale = (operands[:-1], operands[-1:]) if scaled else (operands, ())
    return jnp.concatenate([convert(leaf.reshape(-1), dtype, *scale) for leaf in leaves])


def unpack(
    flat: jax.Array,
    *scale: jax.Array,
    config: None,
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[str, ...],
) -> list[jax.Array]:
    """Compute the op of `txcore.kernels.unpack` on a checked buffer."""
    # The transpose of one split is one concatenate; that of slices is a pad each, and a sum.
    parts = lax.split(flat, [prod(shape) for shape in shapes])
    return [
        convert(part.reshape(shape), dtype, *scale)
        for part, shape, dtype in zip(parts, shapes, dtypes, strict=True)
    ]


def convert(x: jax.Array, dtype: str, *scale: jax.Array) -> jax.Array:
    """Cast, after the multiplication by the scale in its wide dtype if there is one."""
    return (x.astype(scale[0].dtype) * scale[0] if scale else x).astype(dtype)
