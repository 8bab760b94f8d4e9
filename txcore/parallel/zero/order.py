"""Make a value wait for another, where the compiler would have it earlier."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore import _compat
from txcore.kernels.dispatch.registry import current_device
from txcore.parallel.parts import typed_as

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def after(tree: Any, other: Any) -> Any:
    """Return a tree that is not there before another one is.

    A barrier says so. Where XLA removes it before it orders the operations (for GPU, and for CPU
    with jax 0.10), each array is also made of a number of the other tree, which is 0.

    Args:
      tree: pytree of arrays.
      other: pytree of arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    others = [x for x in jax.tree.leaves(other) if isinstance(x, jax.Array) and x.size]
    if not leaves or not others:
        return tree
    waiting, others = lax.optimization_barrier((leaves, others))
    numbers = [x for x in others if jnp.issubdtype(x.dtype, jnp.floating)]
    if numbers and not _compat.keeps_barriers(current_device()[0]):
        zero = _zero_of(numbers[-1])
        waiting = [_with_zero(leaf, zero) for leaf in waiting]
    typed = [typed_as(leaf, was) for leaf, was in zip(waiting, leaves, strict=True)]
    return jax.tree.unflatten(structure, typed)


def _zero_of(x: jax.Array) -> jax.Array:
    """Return 0 as a number that is computed from an array, which no compiler folds."""
    first = jnp.reshape(x, -1)[0]
    bits = lax.bitcast_convert_type(first, _BITS[first.dtype.itemsize])
    return lax.shift_right_logical(
        lax.shift_right_logical(bits.astype(jnp.uint32), jnp.uint32(31)), jnp.uint32(1)
    )


def _with_zero(x: jax.Array, zero: jax.Array) -> jax.Array:
    if x.dtype.itemsize not in _BITS or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    bits = lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize])
    return lax.bitcast_convert_type(bits ^ zero.astype(bits.dtype), x.dtype)
