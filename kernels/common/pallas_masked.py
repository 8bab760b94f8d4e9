"""What the Pallas kernels share that compute the places of the elements they load and store.

A kernel sees whole flat arrays instead of blocks of them. An element outside of an array is
masked, so no operand is padded: a padded one would be a copy.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from txcore import _compat, varying
from txcore.kernels.dispatch import registry

MOST_ELEMENTS = 2**31 - 1  # places are counted in 32 bits


def on_gpu() -> bool:
    """Tell whether a kernel that is traced here is compiled, not interpreted."""
    return registry.current_device()[0] == "gpu"


def too_large(*sizes: int) -> str | None:
    """Return why arrays of these sizes cannot be counted, or None."""
    if max(sizes, default=0) <= MOST_ELEMENTS:
        return None
    return (
        f"its kernel counts elements in 32 bits, up to {MOST_ELEMENTS}, and an array of "
        f"{max(sizes)} is needed (use smaller batches)"
    )


def call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    results: Sequence[tuple[int, Any]],
    *operands: jax.Array,
    warps: int,
    stages: int | None = None,
    aliases: Mapping[int, int] | None = None,
) -> list[jax.Array]:
    """Run a kernel on flat arrays, interpreted unless a GPU is there to compile it for.

    Args:
      kernel: called with a reference to each operand and each result, all flat.
      grid: the number of programs along each dim.
      results: the size and dtype of each result.
      *operands: arrays that vary along the same axes.
      warps: of a GPU's program.
      stages: loop steps whose loads are under way at once; None for Pallas' default.
      aliases: the operands, by place, whose memory a result takes; each has its size and dtype.

    Returns:
      The results, flat.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    compiled = on_gpu()

    def run(*flat: jax.Array) -> list[jax.Array]:
        return pl.pallas_call(  # type: ignore[no-any-return]
            kernel,
            [_compat.shape_like(flat[0], (size,), dtype) for size, dtype in results],
            grid=grid,
            input_output_aliases=dict(aliases or {}),
            interpret=not compiled,
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        )(*flat)

    flat = [operand.reshape(-1) for operand in operands]
    return run(*flat) if compiled else varying.run_untracked(run, *flat)  # type: ignore[no-any-return]


def numbers(start: Any, size: int) -> jax.Array:
    """Return `size` numbers from `start` on."""
    return jnp.asarray(start, jnp.int32) + jnp.arange(size, dtype=jnp.int32)


def load(
    ref: Any, place: jax.Array, inside: jax.Array | None = None, other: float = 0
) -> jax.Array:
    """Return the elements at some places, and `other` where the mask is off."""
    from jax.experimental.pallas import triton

    if inside is None:
        return triton.load(ref.at[place])
    place, inside = jnp.broadcast_arrays(place, inside)
    return triton.load(ref.at[place], mask=inside, other=other)


def store(ref: Any, place: jax.Array, value: jax.Array, inside: jax.Array | None = None) -> None:
    """Write elements to some places, none where the mask is off."""
    from jax.experimental.pallas import triton

    value = value.astype(ref.dtype)
    if inside is None:
        triton.store(ref.at[place], value)
        return
    if not on_gpu():
        # An interpreter writes the old value where the mask is off: out of bounds it writes none.
        place = jnp.where(inside, place, ref.shape[0])
    place, inside = jnp.broadcast_arrays(place, inside)
    triton.store(ref.at[place], value, mask=inside)
