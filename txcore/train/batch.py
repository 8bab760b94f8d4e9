"""A batch: which of its leaves hold examples, and how it is placed on the mesh."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from txcore.mesh import MeshSpec
from txcore.plan import Plan, top_key


def examples(batch: Any, plan: Plan) -> tuple[int, Any]:
    """Return how many examples `batch` holds, and its mask (None where all are real).

    Examples lie along the leading dim of those leaves for which the plan declares no other
    layout; the mask is the leaf "mask" at the top of a dict, named tuple or dataclass.
    """
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    mask = next((leaf for path, leaf in leaves if top_key(path) == "mask"), None)
    counts = [leaf.shape[0] for path, leaf in leaves if top_key(path) not in plan.batch]
    return (int(counts[0]) if counts else 1), mask


def shard_batch(batch: Any, mesh: MeshSpec, plan: Plan) -> Any:
    """Place a batch on the mesh's devices as the plan says.

    Args:
      batch: pytree of host arrays; the leading dim is the global batch in one process, this
        process's part of it in several. They are copied: a buffer may be filled anew at once.
        Arrays that lie on the mesh in the right layout are taken as they are.
      mesh: the mesh.
      plan: the plan.

    Returns:
      Global arrays, sharded.

    Raises:
      ValueError: a dim is not divisible by the devices that share it, or a leaf has no dim.
    """

    def place(path: Any, leaf: Any, spec: PartitionSpec) -> jax.Array:
        where = f"batch{jax.tree_util.keystr(path)}"
        return _place(leaf, NamedSharding(mesh.mesh, spec), where)

    return jax.tree_util.tree_map_with_path(place, batch, plan.batch_specs(batch, mesh))


def _place(leaf: Any, sharding: NamedSharding, where: str) -> jax.Array:
    if isinstance(leaf, jax.Array) and leaf.committed and leaf.sharding == sharding:
        return leaf
    # A copy, since on CPU jax would use the caller's memory itself while steps are under way.
    host = np.array(leaf)
    _check_divisible(host.shape, sharding, where)
    if jax.process_count() == 1:
        return jax.device_put(host, sharding)
    return jax.make_array_from_process_local_data(sharding, host)


def _check_divisible(shape: tuple[int, ...], sharding: NamedSharding, where: str) -> None:
    mesh, spec = sharding.mesh, sharding.spec
    if len(shape) < len(spec):
        raise ValueError(
            f"{where} needs at least {len(spec)} dims to be sharded by {spec}, got shape {shape}"
        )
    # Several processes give only their own part, which their own devices share.
    processes = jax.process_count()
    for dim, entry in enumerate(spec):
        axes = tuple(a for a in (entry if isinstance(entry, tuple) else (entry,)) if a is not None)
        size = math.prod(mesh.shape[a] for a in axes)
        length = shape[dim] * (processes if dim == 0 else 1)
        if length % size:
            names = ", ".join(map(repr, axes))
            what = "examples" if dim == 0 else f"in dim {dim}"
            raise ValueError(
                f"{where} has {length} {what}, which {size} devices along axis {names} cannot "
                f"share equally: use a size divisible by {size}, or pad it (and set the mask)"
            )
