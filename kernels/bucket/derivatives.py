"""The gradients of packing and unpacking: each is the transpose of the other."""

from collections.abc import Callable
from typing import Any

import jax

Shapes = tuple[tuple[int, ...], ...]
Dtypes = tuple[str, ...]
Arrays = tuple[jax.Array, ...]


def differentiate_buckets(
    pack: Callable[..., jax.Array], unpack: Callable[..., list[jax.Array]]
) -> tuple[Callable[..., jax.Array], Callable[..., list[jax.Array]]]:
    """Make a pair of kernels differentiable: each serves as the gradient of the other.

    Args:
      pack: `pack(leaves, scale, dtype, config)`, where `scale` is a tuple of one scalar or none.
      unpack: `unpack(flat, scale, shapes, dtypes, config)`.

    Returns:
      Both kernels, differentiable in the leaves and in the buffer. The scale has no gradient.
    """
    packed = jax.custom_vjp(pack, nondiff_argnums=(2, 3))
    unpacked = jax.custom_vjp(unpack, nondiff_argnums=(2, 3, 4))

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
    return packed, unpacked
