"""All of it to and fro with a partner 1, 2, 4 ... devices away, or halves of it."""

import jax
from jax import lax

from txcore import varying
from txcore.collectives import axis_index, axis_size, ppermute
from txcore.parallel.gradients.algorithms.pieces import average_in_pieces, piece_widths
from txcore.parallel.gradients.algorithms.record import (
    Axes,
    Sizes,
    claim_equal,
    count_devices,
    predict_sent,
)
from txcore.parallel.predicted import Predicted


def is_power_of_two(devices: int) -> bool:
    """Tell whether devices can be joined in pairs, these in pairs, and so on to one."""
    return devices.bit_count() == 1


def doubling_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average by exchanges of all of it, each with a device twice as far away."""
    count = axis_size(axes)

    def mean(piece: jax.Array) -> jax.Array:
        for away in _list_distances(count):
            # a + b is b + a to the last bit, so that all devices get the same.
            piece = piece + ppermute(piece, axes, _pair_ranks(count, away), name=f"{name}/{away}")
        return piece / count

    return claim_equal(average_in_pieces(flat, axes, mean), axes)


def halving_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average by exchanges of halves, each with a device half as far away."""
    count, here = axis_size(axes), axis_index(axes)
    for away in reversed(_list_distances(count)):
        halves = blocks.reshape(2, away, blocks.shape[1])
        mine = (here // away) % 2
        kept, given = (
            lax.dynamic_index_in_dim(halves, i, keepdims=False) for i in (mine, 1 - mine)
        )
        blocks = kept + ppermute(given, axes, _pair_ranks(count, away), name=f"{name}/{away}")
    return varying.claim(blocks[0] / count, varying.MEAN_SHARD, axes)


def _list_distances(count: int) -> list[int]:
    return [1 << step for step in range(count.bit_length() - 1)]


def _pair_ranks(count: int, away: int) -> list[tuple[int, int]]:
    return [(i, i ^ away) for i in range(count)]


def send_doubling(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `doubling_mean` sends."""
    hops = len(_list_distances(count_devices(sizes)))
    return [
        predict_sent("collective-permute", sizes, dtype, *piece_widths(elements, dtype, 1) * hops)
    ]


def send_halving(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `halving_blocks` sends."""
    devices = count_devices(sizes)
    sent = [elements * away // devices for away in _list_distances(devices)]
    return [predict_sent("collective-permute", sizes, dtype, *sent)]
