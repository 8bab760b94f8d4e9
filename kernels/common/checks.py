"""Checks that the ops share: what was required, what was given, what to do."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def require_floats(op: str, **arrays: Any) -> tuple[jax.Array, ...]:
    """Return `arrays` as jax arrays, or refuse one that is not floating-point."""
    for name, array in arrays.items():
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise TypeError(
                f"{op}: {name} needs a floating-point dtype, got {jnp.result_type(array)}: "
                f"cast it, for example {name}.astype(jnp.float32)"
            )
    return tuple(jnp.asarray(array) for array in arrays.values())


def require_same_dtype(op: str, **arrays: jax.Array) -> None:
    """Refuse operands of different dtypes: promoting them would hide what precision is used."""
    if len({array.dtype for array in arrays.values()}) > 1:
        given = ", ".join(f"{name} {array.dtype}" for name, array in arrays.items())
        raise TypeError(
            f"{op}: {', '.join(arrays)} need one dtype, got {given}: "
            "cast them to the one to compute in"
        )


def require_one_of(op: str, option: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse an option's value that is not among the allowed ones."""
    if value not in allowed:
        raise ValueError(
            f"{op}: {option} needs one of {', '.join(map(repr, allowed))}, got {value!r}"
        )


def whole_number(value: Any) -> int | None:
    """Return an integer (Python's, NumPy's or an array with one element) as an int, else None."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def require_in_range(op: str, option: str, value: Any, low: float, high: float) -> None:
    """Refuse a number outside [low, high), unless it is on a device or traced."""
    known = isinstance(value, int | float | np.number | np.ndarray) and np.ndim(value) == 0
    if known and not low <= float(value) < high:
        bounds = f"of at least {low}" if high == float("inf") else f"in [{low}, {high})"
        raise ValueError(f"{op}: {option} needs a finite number {bounds}, got {value!r}")


def common_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """Return the dtype that jax's standard promotion gives, whatever jax is configured to."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, [jnp.dtype(dtype) for dtype in dtypes])


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype to compute in for operands of `dtype`: float32 or wider."""
    return common_dtype(dtype, jnp.float32)


def accumulator_of(x: Any) -> jnp.dtype:
    """Return the dtype to compute in for an array, a number, or what has a dtype."""
    return accumulator(jnp.result_type(x))


def lift_rank(x: jax.Array, like: jax.Array) -> jax.Array:
    """Return `x` with dims of size 1 in front, until it has as many dims as `like`.

    Broadcasting would add them, but `jax_numpy_rank_promotion="raise"` forbids that.
    """
    return jax.lax.expand_dims(x, range(like.ndim - x.ndim))
