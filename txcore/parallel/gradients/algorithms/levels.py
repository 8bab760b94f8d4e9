"""Over the last axis (a node's devices) all of it, over the others each device's part."""

import jax

from txcore.collectives import all_gather, axis_size, pmean, reduce_scatter
from txcore.parallel.gradients.algorithms.plain import (
    plain_blocks,
    send_all_reduce,
    send_reduce_scatter,
    send_two_steps,
)
from txcore.parallel.gradients.algorithms.record import Axes, Sizes, count_devices, pad_to_blocks
from txcore.parallel.predicted import Predicted


def levels_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average over the last axis, over the others each device its part, and gather."""
    outer, inner = axes[:-1], axes[-1:]
    blocks = pad_to_blocks(flat, axis_size(inner))
    part = plain_blocks(blocks, inner, f"{name}/inner")
    if outer:
        part = pmean(part, outer, name=f"{name}/outer")
    return all_gather(part, inner, invariant=True, name=f"{name}/inner")[: flat.size]


def levels_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average over the last axis, and then over the others."""
    outer, inner = axes[:-1], axes[-1:]
    grid = blocks.reshape(-1, axis_size(inner), blocks.shape[1])
    part = reduce_scatter(grid, inner, dim=1, mean=True, name=f"{name}/inner")[:, 0]
    return plain_blocks(part, outer, f"{name}/outer") if outer else part[0]


def send_levels(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `levels_mean` sends."""
    outer, inner = _split_levels(sizes)
    padded = elements + -elements % count_devices(inner)
    first, last = send_two_steps(elements, dtype, inner)
    middle = send_all_reduce(padded // count_devices(inner), dtype, outer) if outer else []
    return [first, *middle, last]


def send_scattered_levels(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `levels_blocks` sends."""
    outer, inner = _split_levels(sizes)
    sent = send_reduce_scatter(elements, dtype, inner)
    left = elements // count_devices(inner)
    return sent + (send_reduce_scatter(left, dtype, outer) if outer else [])


def _split_levels(sizes: Sizes) -> tuple[Sizes, Sizes]:
    *outer, inner = sizes.items()
    return dict(outer), dict([inner])
