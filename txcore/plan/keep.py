"""What a plan makes communication keep from step to step: all of it together."""

import math
from typing import Any

import jax

from txcore.mesh import MeshSpec
from txcore.optim import Optimizer
from txcore.parallel import local_sgd
from txcore.parallel.gradients import delayed
from txcore.parallel.gradients.compression import as_compression
from txcore.parallel.gradients.compression.feedback import KEY as COMPRESSION
from txcore.parallel.gradients.compression.feedback import keep_compressed


def keep_all(plan: Any, params: Any, mesh: MeshSpec, optimizer: Optimizer) -> Any:
    """Return what `Plan.kept` says."""
    dp, axes = plan.data_parallel, plan.active_data_axes(mesh)
    copies = math.prod(mesh.shape[axis] for axis in axes)
    shapes = jax.eval_shape(lambda tree: tree, params)
    layouts = plan.layouts(shapes, mesh)
    kept = {}
    if (rounds := plan.rounds(mesh)) is not None:
        kept[local_sgd.KEY] = local_sgd.keep_local(rounds, optimizer, params, layouts, copies)
    if dp is not None and dp.delay:
        kept[delayed.KEY] = delayed.keep_delayed(params, layouts, axes, copies)
    compression = None if dp is None else as_compression("DP", dp.compression)
    if compression is not None:
        own = keep_compressed(compression, shapes, layouts, axes, mesh.shape)
        if own is not None:
            kept[COMPRESSION] = own
    return kept or None
