"""How a state comes to lie on the mesh."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from txcore.kept import start_all
from txcore.layout import axes_of
from txcore.mesh import MeshSpec
from txcore.optim import Optimizer
from txcore.train.numerics import loss_scale
from txcore.train.options import Options
from txcore.train.replicas import agreement, digests
from txcore.train.replicas.copies import copy_to_host
from txcore.train.state.layout import check_optimizer, place_leaf, split_as, state_specs


def create_arrays(
    options: Options, params: Any, extra: Any, broadcast_from: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the arrays of a run that has made no step yet, on the mesh, by their fields' names.

    With them come lines that say, bit for bit, what a process was given and holds no copy of any
    more, since it has a part: ranks compare them before the first step.

    Args:
      options: the engine's.
      params: pytree of arrays to train.
      extra: pytree of arrays that are not trained.
      broadcast_from: the rank whose values all ranks take; None takes each rank's own.

    Raises:
      TypeError: a leaf is no array.
      ValueError: `broadcast_from` is no rank of this run, a rule of the plan does not fit the
        parameters, or the optimizer not what it splits.
      MismatchError: with `broadcast_from`, the leaves of the ranks differ.
    """
    if broadcast_from is not None:
        agreement.check_rank("create_state", "broadcast_from", broadcast_from)
    params, extra = copy_to_host(params, "params", trained=True), copy_to_host(extra, "extra")
    params = options.plan.as_stored(params)
    scaling = options.precision.scaling
    if scaling is None and options.on_nonfinite == "skip":
        scaling = 1.0
    kept = options.plan.kept(params, options.mesh, options.optimizer)
    is_local = options.plan.rounds(options.mesh) is not None  # then each device keeps its own
    opt_state = {} if is_local else _init_on_host(options.optimizer, params)
    arrays = {
        "step": np.zeros((), np.int32),
        "stored_params": params,
        "opt_state": copy_to_host(opt_state, "optimizer state"),
        "seed": np.asarray(options.seed, np.uint32),
        "extra": extra,
        "loss_scaling": loss_scale.start(scaling),
        "comm_state": start_all(kept),
    }
    layouts = options.plan.layouts(params, options.mesh)
    check_optimizer(options.optimizer, layouts, options.plan.data_parallel)
    specs = state_specs(arrays, layouts, kept)
    if broadcast_from is not None and options.spans_processes:
        agreement.check_broadcast(broadcast_from, arrays)
        root = first_device(options.mesh, broadcast_from)
        sent = digests.send_from(arrays, options.mesh.mesh, root)
        return split_as(sent, options.mesh, specs), []
    given = _describe_split(arrays, specs) if options.spans_processes else []
    placed = jax.tree.map(lambda leaf, spec: place_leaf(leaf, options.mesh, spec), arrays, specs)
    return placed, given


def _init_on_host(optimizer: Optimizer, params: Any) -> Any:
    """Return an optimizer's first state, all of it in the host's memory: no device has room."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # the program has started other platforms alone
        return optimizer.init(params)
    with jax.default_device(host):
        return optimizer.init(params)


def _describe_split(arrays: dict[str, Any], specs: dict[str, Any]) -> list[str]:
    """Return a line for each leaf that lies in parts, with a digest of all of it."""

    def line(path: Any, leaf: Any, spec: P) -> str:
        if not axes_of(spec):
            return ""
        digest = hashlib.sha256(np.ascontiguousarray(leaf).data).hexdigest()
        return f"state{jax.tree_util.keystr(path)} sha256 {digest}"

    return [
        one for one in jax.tree.leaves(jax.tree_util.tree_map_with_path(line, arrays, specs)) if one
    ]


def place(fields: dict[str, Any], options: Options, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a state as arrays on the mesh, by its layouts; copy what is not there.

    A field of which all is there is returned itself.

    Args:
      fields: pytrees of arrays and numbers by name, some of them new.
      options: the engine's.
      arrays: all fields of the state in which they are to take the place of those there.

    Raises:
      TypeError: a leaf is no array.
    """
    arrays = {**arrays, **fields}
    plan, params = options.plan, arrays["stored_params"]
    kept = plan.kept(params, options.mesh, options.optimizer)
    specs = state_specs(arrays, plan.layouts(params, options.mesh), kept)
    return {
        name: _place_tree(f"state.{name}", tree, specs[name], options.mesh)
        for name, tree in fields.items()
    }


def _place_tree(what: str, tree: Any, specs: Any, mesh: MeshSpec) -> Any:
    def one(path: Any, leaf: Any, spec: P) -> Any:
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        there = mesh.sharding(*spec)
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(there, leaf.ndim):
            return leaf
        where = f"{what}{jax.tree_util.keystr(path)}"
        return place_leaf(copy_to_host(leaf, where, user="state.replace"), mesh, spec)

    placed = jax.tree_util.tree_map_with_path(one, tree, specs)
    pairs = zip(jax.tree.leaves(placed), jax.tree.leaves(tree), strict=True)
    return tree if all(new is old for new, old in pairs) else placed


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
