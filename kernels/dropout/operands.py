"""Checks of the operands of every op with dropout."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore import _compat
from txcore.kernels.common import checks


def require_fixed_rate(op: str, name: str, rate: Any) -> float:
    """Return a dropout rate as a float, or refuse one that is traced or out of range."""
    if not isinstance(rate, int | float | np.floating):
        raise TypeError(
            f"{op}: {name} needs a Python number, since it is part of the compiled program, got "
            f"{type(rate).__name__}: make it a static argument of jax.jit, or close over it"
        )
    checks.require_in_range(op, name, float(rate), 0, 1)
    return float(rate)


def require_counter(op: str, offset: Any, count: int) -> jax.Array:
    """Return the first counter as a uint32 scalar, or refuse it."""
    if jnp.shape(offset) != () or not jnp.issubdtype(jnp.result_type(offset), jnp.integer):
        raise TypeError(
            f"{op}: offset needs an integer scalar, got {jnp.result_type(offset)} of shape "
            f"{jnp.shape(offset)}: pass tx.axis_index(axis) * features, say"
        )
    first = int(offset) if isinstance(offset, int | np.integer) else 0
    if first < 0 or first + count > 2**32:
        raise ValueError(
            f"{op}: offset needs to be at least 0, and offset + elements at most 2**32, the "
            f"counters of a key, got offset {first} and {count} elements for each key: give parts "
            "of x keys of their own"
        )
    return jnp.asarray(offset).astype(jnp.uint32)


def refuse_repeated_masks(
    op: str, count: int, seeds: dict[str, jax.Array], **arrays: jax.Array
) -> None:
    """Refuse different shards that would all drop the same elements.

    Args:
      op: the op's name.
      count: how many elements of a shard have one key.
      seeds: the keys and the offset; one of them must vary along every axis that an array does.
      **arrays: the op's other operands.
    """
    seeded = frozenset[str]().union(*map(_compat.varying_axes, seeds.values()))
    for name, array in arrays.items():
        for axis in sorted(_compat.varying_axes(array) - seeded):
            if _compat.axis_size(axis) != 1:
                raise ValueError(
                    f"{op}: {name} varies along mesh axis {axis!r} and needs keys or an offset "
                    f"that do, got neither, so that all its shards would drop the same {count} "
                    f"elements of a row: pass offset=tx.axis_index({axis!r}) * {count} where the "
                    "axis splits the features, or keys that differ along it "
                    f"(jax.random.fold_in with tx.axis_index({axis!r}))"
                )
