"""One all-reduce, or a reduce-scatter and an all-gather."""

import jax

from txcore.collectives import all_gather, axis_size, pmean, reduce_scatter
from txcore.parallel.gradients.algorithms.record import (
    Axes,
    Sizes,
    count_devices,
    pad_to_blocks,
    predict_sent,
)
from txcore.parallel.predicted import Predicted


def plain_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average by one all-reduce."""
    return pmean(flat, axes, name=name)


def plain_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average by one reduce-scatter."""
    return reduce_scatter(blocks, axes, mean=True, name=name)[0]


def send_all_reduce(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `plain_mean` sends."""
    return [predict_sent("all-reduce", sizes, dtype, elements)]


def send_reduce_scatter(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `plain_blocks` sends."""
    return [predict_sent("reduce-scatter", sizes, dtype, elements)]


def two_step_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average one block on each device, and gather all of them."""
    blocks = pad_to_blocks(flat, axis_size(axes))
    part = plain_blocks(blocks, axes, name)
    return all_gather(part, axes, invariant=True, name=name)[: flat.size]


def send_two_steps(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `two_step_mean` sends."""
    padded = elements + -elements % count_devices(sizes)
    return [
        predict_sent("reduce-scatter", sizes, dtype, padded),
        predict_sent("all-gather", sizes, dtype, padded),
    ]
