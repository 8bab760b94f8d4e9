"""How a state comes to lie on the mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore import _compat
from txcore.mesh import MeshSpec
from txcore.train.numerics import loss_scale
from txcore.train.options import Options
from txcore.train.replicas import agreement, digests
from txcore.train.replicas.copies import copies


def create_arrays(
    options: Options, params: Any, extra: Any, broadcast_from: int | None
) -> dict[str, Any]:
    """Return the arrays of a run that has made no step yet, on the mesh, by their fields' names.

    Args:
      options: the engine's.
      params: pytree of arrays to train.
      extra: pytree of arrays that are not trained.
      broadcast_from: the rank whose values all ranks take; None takes each rank's own.

    Raises:
      TypeError: a leaf is no array.
      ValueError: `broadcast_from` is no rank of this run.
      MismatchError: with `broadcast_from`, the leaves of the ranks differ.
    """
    if broadcast_from is not None:
        agreement.check_rank("create_state", "broadcast_from", broadcast_from)
    params, extra = copies(params, "params", trained=True), copies(extra, "extra")
    scaling = options.precision.scaling
    if scaling is None and options.on_nonfinite == "skip":
        scaling = 1.0
    arrays = {
        "step": np.zeros((), np.int32),
        "stored_params": params,
        "opt_state": copies(options.optimizer.init(params), "optimizer state"),
        "seed": np.asarray(options.seed, np.uint32),
        "extra": extra,
        "loss_scaling": loss_scale.start(scaling),
    }
    if broadcast_from is not None and options.spans_processes:
        agreement.check_broadcast(broadcast_from, arrays)
        root = first_device(options.mesh, broadcast_from)
        return digests.send_from(arrays, options.mesh.mesh, root)
    return jax.tree.map(lambda leaf: replicate(leaf, options.mesh), arrays)


def place(tree: Any, mesh: MeshSpec, what: str) -> Any:
    """Return a pytree as arrays on the mesh, the same on every device; copy what is not there.

    Where all of it is there it is returned itself.

    Args:
      tree: pytree of arrays and numbers.
      mesh: the mesh.
      what: what errors call it.

    Raises:
      TypeError: a leaf is no array.
    """
    there = mesh.sharding()

    def place_leaf(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(there, leaf.ndim):
            return leaf
        where = f"{what}{jax.tree_util.keystr(path)}"
        return replicate(copies(leaf, where, user="state.replace"), mesh)

    placed = jax.tree_util.tree_map_with_path(place_leaf, tree)
    pairs = zip(jax.tree.leaves(placed), jax.tree.leaves(tree), strict=True)
    return tree if all(new is old for new, old in pairs) else placed


def replicate(leaf: Any, mesh: MeshSpec) -> jax.Array:
    """Return a copy of an array of the host, or of typed keys, on every device of the mesh."""
    if _compat.is_key_array(leaf):
        data = replicate(jax.random.key_data(leaf), mesh)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    sharding = mesh.sharding()
    host = np.asarray(leaf)
    if jax.process_count() == 1:
        # device_put may alias an array that is there already, and a step donates it.
        return jnp.array(jax.device_put(host, sharding), copy=True)
    return jax.make_array_from_process_local_data(sharding, host, host.shape)


def first_device(mesh: MeshSpec, rank: int) -> int:
    """Return the place in the mesh of a process's first device, or refuse a rank without one."""
    ranks = [device.process_index for device in mesh.devices]
    if rank not in ranks:
        raise ValueError(
            f"create_state needs broadcast_from= a rank with devices in the mesh, {ranks}, "
            f"got {rank}"
        )
    return ranks.index(rank)


def broadcast_program(
    arrays: Any, mesh: MeshSpec, broadcast_from: int
) -> tuple[Callable[..., Any], Any]:
    """Return the program by which a state would be sent, and the shapes that it takes."""
    agreement.check_rank("audit_broadcast", "broadcast_from", broadcast_from)
    root = first_device(mesh, broadcast_from)
    return digests.sending_program(mesh.mesh, root), digests.sending_shapes(arrays, mesh.mesh)
