"""The operands of every op with dropout: what they must be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore import _compat
from txcore.kernels.common import checks


def fixed_rate(op: str, name: str, rate: Any) -> float:
    """Return a dropout rate as a float, or refuse one that is traced or out of range."""
    if not isinstance(rate, int | float | np.floating):
        raise TypeError(
            f"{op}: {name} must be a Python number; got {type(rate).__name__}. It is part of the "
            "compiled program: make it an argument that jax.jit holds static, or close over it."
        )
    checks.in_range(op, name, float(rate), 0, 1)
    return float(rate)


def counter_offset(op: str, offset: Any, count: int) -> jax.Array:
    """Return the first counter as a uint32 scalar, or refuse it."""
    if jnp.shape(offset) != () or not jnp.issubdtype(jnp.result_type(offset), jnp.integer):
        raise TypeError(
            f"{op}: offset must be an integer scalar; got {jnp.result_type(offset)} of shape "
            f"{jnp.shape(offset)}."
        )
    first = int(offset) if isinstance(offset, int | np.integer) else 0
    if first < 0 or first + count > 2**32:
        raise ValueError(
            f"{op}: offset must be at least 0, and one key has 2**32 counters; got offset {first} "
            f"and {count} elements for each key. Give parts of x keys of their own."
        )
    return jnp.asarray(offset).astype(jnp.uint32)


def refuse_repeated_masks(
    op: str, count: int, seeds: dict[str, jax.Array], **arrays: jax.Array
) -> None:
    """Refuse shards that would all drop the same elements of what are different ones.

    Args:
      op: the op's name.
      count: how many elements of a shard have one key.
      seeds: keys and offset, of which one must vary wherever an array does.
      **arrays: the op's other operands.
    """
    seeded = frozenset[str]().union(*map(_compat.varying_axes, seeds.values()))
    for name, array in arrays.items():
        for axis in sorted(_compat.varying_axes(array) - seeded):
            if _compat.axis_size(axis) != 1:
                raise ValueError(
                    f"{op}: {name} varies along mesh axis {axis!r}, but neither keys nor offset "
                    f"does: its shards would all drop the same {count} elements of a "
                    f"row. Pass offset=tx.axis_index({axis!r}) * {count} where the axis splits "
                    "the features, or keys that differ along it "
                    f"(jax.random.fold_in with tx.axis_index({axis!r}))."
                )
