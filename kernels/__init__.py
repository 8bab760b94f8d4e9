"""Pure functions on arrays, each with one interface and a choice of implementations.

They know nothing of meshes or of training, and add no collective: those of `kernels.ring` are
collectives, by remote DMA over one mesh axis. Where the operands of one call vary along different
mesh axes, they are first cast to vary along all of them.

Imports `kernels.bucket`, `kernels.common`, `kernels.conv`, `kernels.cross_entropy`,
`kernels.dense`, `kernels.dropout`, `kernels.linear_cross_entropy`, `kernels.optimizer`,
`kernels.ring`, `kernels.squared_norm`, `later`.
"""

if __name__ == "kernels":  # found by its folder, not as the installed package
    raise ImportError("'kernels' is installed as txcore.kernels: write 'import txcore.kernels'")

from typing import TYPE_CHECKING

from txcore.kernels.bucket import pack, unpack
from txcore.kernels.common.compiler_options import compiler_options
from txcore.kernels.cross_entropy import cross_entropy
from txcore.kernels.dense import dense
from txcore.kernels.dropout import dropout
from txcore.kernels.linear_cross_entropy import linear_cross_entropy
from txcore.kernels.optimizer import adamw, sgd_momentum
from txcore.kernels.ring import (
    ring_all_gather,
    ring_all_gather_matmul,
    ring_all_reduce,
    ring_matmul_reduce_scatter,
    ring_reduce_scatter,
)
from txcore.kernels.squared_norm import squared_norm
from txcore.later import import_later

if TYPE_CHECKING:
    from txcore.kernels.conv import conv2d

__getattr__ = import_later(__name__, {"conv2d": "txcore.kernels.conv"})

__all__ = [
    "adamw",
    "compiler_options",
    "conv2d",
    "cross_entropy",
    "dense",
    "dropout",
    "linear_cross_entropy",
    "pack",
    "ring_all_gather",
    "ring_all_gather_matmul",
    "ring_all_reduce",
    "ring_matmul_reduce_scatter",
    "ring_reduce_scatter",
    "sgd_momentum",
    "squared_norm",
    "unpack",
]
