"""The algorithms that average flat arrays over devices: what each computes, and what it sends.

All compute the same means by other collectives. Each is one record of `ALGORITHMS`. Whoever has a
flat array and axes of more than one device calls `mean_flat`, or `mean_blocks` where each device is
to have its own block of the mean alone. Both have the derivatives of the plain collective: no
algorithm differentiates its own steps.

Imports `_compat`, `collectives`, `kernels.ring`, `parallel`, `varying`.
"""

from collections.abc import Mapping
from typing import get_args

from txcore.parallel.gradients.algorithms import (
    doubling,
    levels,
    narrow,
    pieces,
    plain,
    remote,
    ring,
)
from txcore.parallel.gradients.algorithms.doubling import is_power_of_two as is_power_of_two
from txcore.parallel.gradients.algorithms.means import mean_blocks as mean_blocks
from txcore.parallel.gradients.algorithms.means import mean_flat as mean_flat
from txcore.parallel.gradients.algorithms.record import Algorithm as Algorithm
from txcore.parallel.gradients.algorithms.record import Name as Name

ALGORITHMS: Mapping[Name, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm(
            "plain",
            plain.plain_mean,
            plain.plain_blocks,
            plain.send_all_reduce,
            plain.send_reduce_scatter,
        ),
        Algorithm(
            "chunked",
            pieces.chunked_mean,
            pieces.chunked_blocks,
            pieces.send_chunks,
            pieces.send_scattered_chunks,
        ),
        Algorithm(
            "reduce_scatter_all_gather",
            plain.two_step_mean,
            plain.plain_blocks,
            plain.send_two_steps,
            plain.send_reduce_scatter,
        ),
        Algorithm("ring", ring.ring_mean, ring.ring_blocks, ring.send_ring, ring.send_half_ring),
        Algorithm(
            "recursive_doubling",
            doubling.doubling_mean,
            doubling.halving_blocks,
            doubling.send_doubling,
            doubling.send_halving,
        ),
        Algorithm(
            "hierarchical",
            levels.levels_mean,
            levels.levels_blocks,
            levels.send_levels,
            levels.send_scattered_levels,
        ),
        Algorithm(
            "bf16_wire",
            narrow.narrow_mean,
            narrow.narrow_blocks,
            narrow.send_narrow,
            narrow.send_scattered_narrow,
        ),
    )
}
# By kernels of the platform's own, which send other amounts on each.
ALGORITHMS_BY_KERNELS: Mapping[str, Mapping[Name, Algorithm]] = {
    "tpu": {
        "remote_dma": Algorithm(
            "remote_dma",
            remote.remote_mean,
            remote.remote_blocks,
            remote.send_round,
            remote.send_blocks_round,
        )
    },
    "gpu": {
        "remote_dma": Algorithm(
            "remote_dma",
            remote.remote_mean,
            remote.remote_blocks,
            remote.send_to_switch,
            remote.send_blocks_to_switch,
        )
    },
}
assert all({*ALGORITHMS, *some} == {*get_args(Name)} for some in ALGORITHMS_BY_KERNELS.values())


def by_kernels_of(platform: str) -> Mapping[Name, Algorithm]:
    """Return the algorithms by a platform's own kernels; on CPU those of a TPU, simulated."""
    return ALGORITHMS_BY_KERNELS["gpu" if platform == "gpu" else "tpu"]
