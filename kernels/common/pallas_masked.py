"""Calls, loads and stores for Pallas kernels that compute the index of every element.

Such a kernel sees whole flat arrays instead of blocks. It masks the elements that lie outside of
an array, so that no operand has to be padded: padding would copy it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from txcore import _compat, varying
from txcore.kernels.dispatch import registry

MOST_ELEMENTS = 2**31 - 1  # an index has 32 bits


def on_gpu() -> bool:
    """Tell whether a kernel that is traced here will be compiled (else it is interpreted)."""
    return registry.current_device()[0] == "gpu"


def explain_too_large(*sizes: int) -> str | None:
    """Return why a kernel cannot index arrays of these sizes, or None."""
    if max(sizes, default=0) <= MOST_ELEMENTS:
        return None
    return (
        f"its kernel counts elements in 32 bits, up to {MOST_ELEMENTS}, and an array of "
        f"{max(sizes)} is needed (use smaller batches)"
    )


def call_kernel(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    results: Sequence[tuple[int, Any]],
    *operands: jax.Array,
    warps: int,
    stages: int | None = None,
    aliases: Mapping[int, int] | None = None,
) -> list[jax.Array]:
    """Run a kernel on flat arrays: compiled for a GPU, interpreted elsewhere.

    Args:
      kernel: called with a reference to each operand and each result, all flat.
      grid: the number of programs along each dim.
      results: the size and dtype of each result.
      *operands: arrays that vary along the same mesh axes.
      warps: of a program on a GPU.
      stages: how many loop steps have their loads in flight at once; None for Pallas' default.
      aliases: operand number -> number of the result that takes its memory; both have one size
        and dtype.

    Returns:
      The results, flat.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    compiled = on_gpu()

    def run_flat(*flat: jax.Array) -> list[jax.Array]:
        return pl.pallas_call(  # type: ignore[no-any-return]
            kernel,
            [_compat.shape_like(flat[0], (size,), dtype) for size, dtype in results],
            grid=grid,
            input_output_aliases=dict(aliases or {}),
            interpret=not compiled,
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        )(*flat)

    flat = [operand.reshape(-1) for operand in operands]
    return run_flat(*flat) if compiled else varying.run_untracked(run_flat, *flat)  # type: ignore[no-any-return]


def count_from(start: Any, size: int) -> jax.Array:
    """Return the `size` integers from `start` on, int32."""
    return jnp.asarray(start, jnp.int32) + jnp.arange(size, dtype=jnp.int32)


def load(
    ref: Any, place: jax.Array, inside: jax.Array | None = None, other: float = 0
) -> jax.Array:
    """Return the elements at these indices, and `other` where `inside` is false."""
    from jax.experimental.pallas import triton

    if inside is None:
        return triton.load(ref.at[place])
    place, inside = jnp.broadcast_arrays(place, inside)
    return triton.load(ref.at[place], mask=inside, other=other)


def store(ref: Any, place: jax.Array, value: jax.Array, inside: jax.Array | None = None) -> None:
    """Write elements to these indices, except where `inside` is false."""
    from jax.experimental.pallas import triton

    value = value.astype(ref.dtype)
    if inside is None:
        triton.store(ref.at[place], value)
        return
    if not on_gpu():
        # Where the mask is off the interpreter writes the old value back. Out of bounds it writes
        # nothing, so those elements are sent there.
        place = jnp.where(inside, place, ref.shape[0])
    place, inside = jnp.broadcast_arrays(place, inside)
    triton.store(ref.at[place], value, mask=inside)
