"""Which dim of a parameter's state is split over the data axes."""

import math

from jax.sharding import PartitionSpec as P

from txcore.layout import entry_axes
from txcore.mesh import MeshSpec
from txcore.plan.data_parallel import DP


def shard_spec(dp: DP | None, spec: P, shape: tuple[int, ...], mesh: MeshSpec) -> P:
    """Return how the sharded state of a parameter lies on the mesh.

    The largest dim that the devices divide is split, the first of several; a parameter that has
    none keeps its state whole on every device.

    Args:
      dp: the plan's data parallelism.
      spec: how the parameter is split over other axes; of active axes alone.
      shape: of the whole parameter.
      mesh: the devices and their axes.

    Returns:
      The spec with the shard axes in one entry, after those that are there.
    """
    axes = tuple(a for a in dp.shard_axes if mesh.shape[a] > 1) if dp is not None else ()
    devices = math.prod(mesh.shape[a] for a in axes)
    entries = [entry_axes(entry) for entry in spec] + [()] * (len(shape) - len(spec))
    local = [
        size // math.prod(mesh.shape[a] for a in own)
        for size, own in zip(shape, entries, strict=True)
    ]
    fitting = [dim for dim, size in enumerate(local) if size and size % devices == 0]
    if not axes or not fitting:
        return spec
    split = max(fitting, key=lambda dim: (local[dim], -dim))
    entries[split] += axes
    return P(*(own[0] if len(own) == 1 else own or None for own in entries))
