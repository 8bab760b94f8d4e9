"""Packing and unpacking of a kernel for each, and their gradients: each other's transposes."""

from collections.abc import Callable
from typing import Any

import jax

Shapes = tuple[tuple[int, ...], ...]
Dtypes = tuple[str, ...]
Arrays = tuple[jax.Array, ...]


def make_buckets(
    pack_leaves: Callable[..., jax.Array], unpack_buffer: Callable[..., list[jax.Array]]
) -> tuple[Callable[..., jax.Array], Callable[..., list[jax.Array]]]:
    """Return the ops of `txcore.kernels.pack` and `unpack` on checked operands.

    Each kernel serves as the gradient of the other.

    Args:
      pack_leaves: `pack_leaves(leaves, scale, dtype, config)`, where `scale` is a tuple of one
        scalar or none.
      unpack_buffer: `unpack_buffer(flat, scale, shapes, dtypes, config)`.

    Returns:
      Both ops, differentiable in the leaves and in the buffer. The scale has no gradient.
    """
    packed = jax.custom_vjp(pack_leaves, nondiff_argnums=(2, 3))
    unpacked = jax.custom_vjp(unpack_buffer, nondiff_argnums=(2, 3, 4))

    def pack_forward(leaves: Arrays, scale: Arrays, dtype: str, config: Any) -> Any:
        return packed(leaves, scale, dtype, config), (leaves, scale)

    def pack_backward(dtype: str, config: Any, residuals: Any, g: jax.Array) -> Any:
        leaves, scale = residuals
        shapes = tuple(leaf.shape for leaf in leaves)
        return tuple(unpacked(g, scale, shapes, tuple(str(x.dtype) for x in leaves), config)), None

    def unpack_forward(
        flat: jax.Array, scale: Arrays, shapes: Shapes, dtypes: Dtypes, config: Any
    ) -> Any:
        return unpacked(flat, scale, shapes, dtypes, config), (flat, scale)

    def unpack_backward(
        shapes: Shapes, dtypes: Dtypes, config: Any, residuals: Any, g: list[jax.Array]
    ) -> Any:
        flat, scale = residuals
        return packed(tuple(g), scale, str(flat.dtype), config), None

    packed.defvjp(pack_forward, pack_backward)
    unpacked.defvjp(unpack_forward, unpack_backward)

    def pack(*operands: jax.Array, config: Any, dtype: str, scaled: bool) -> jax.Array:
        leaves, scale = (operands[:-1], operands[-1:]) if scaled else (operands, ())
        return packed(leaves, scale, dtype, config)

    def unpack(
        flat: jax.Array, *scale: jax.Array, config: Any, shapes: Shapes, dtypes: Dtypes
    ) -> list[jax.Array]:
        return unpacked(flat, scale, shapes, dtypes, config)

    return pack, unpack
