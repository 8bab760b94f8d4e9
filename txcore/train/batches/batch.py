"""Find which leaves of a batch hold examples; check that their shapes fit a mesh."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from txcore.layout import entry_axes
from txcore.mesh import MeshSpec
from txcore.plan.batch_specs import top_key
from txcore.plan.plan import Plan

Leaves = list[tuple[Any, Any]]  # of a batch, each with its path


def batch_size_and_mask(batch: Any, plan: Plan) -> tuple[int, Any]:
    """Return how many examples `batch` holds, and its mask (None where all are real).

    Examples lie along the leading dim of those leaves that the plan shards there over its row
    axes; the mask is the leaf "mask" of shape (batch,) at the top of a dict, named tuple or
    dataclass.
    """
    leaves = leaves_of(batch)
    rows, mask = _count_rows(leaves, plan), _read_mask(leaves)
    return (rows[0][1] if rows else 1), None if np.ndim(mask) != 1 else mask


def mask_of(batch: Any) -> Any:
    """Return the leaf "mask" at the top of a batch, of any shape, or None."""
    return _read_mask(leaves_of(batch))


def leaves_of(batch: Any) -> Leaves:
    """Return the leaves of a batch with their paths."""
    return jax.tree_util.tree_flatten_with_path(batch)[0]


def _read_mask(leaves: Leaves) -> Any:
    return next((leaf for path, leaf in leaves if top_key(path) == "mask"), None)


def _count_rows(leaves: Leaves, plan: Plan) -> list[tuple[Any, int]]:
    """Return the path and leading size of each leaf with examples; refuse a batch without any."""
    found = []
    for path, leaf in leaves:
        if not _holds_examples(top_key(path), plan):
            continue
        shape = getattr(leaf, "shape", ())
        if not shape:
            raise ValueError(explain_missing_rows(name_leaf(path), leaf))
        found.append((path, int(shape[0])))
    return found


def name_leaf(path: Any) -> str:
    """Return what errors call a leaf; called only for an error, since it takes time."""
    return f"batch{jax.tree_util.keystr(path)}"


def _holds_examples(key: str, plan: Plan) -> bool:
    """Tell whether the plan gives a leaf one row for each example."""
    if key not in plan.batch:
        return True
    spec = plan.batch[key]
    return bool(plan.row_axes) and bool(spec) and set(entry_axes(spec[0])) == set(plan.row_axes)


def _explain_sharing(path: Any) -> str:
    """Return what to write of a leaf that all examples share."""
    key = top_key(path)
    if key:
        return f"Plan(batch={{{key!r}: P()}})"
    return "as a leaf of a dict batch, by Plan(batch={key: P()})"


def check_rows(leaves: Leaves, plan: Plan) -> list[tuple[Any, int]]:
    """Return the path and leading size of each leaf with examples; the sizes have to be equal.

    Raises:
      ValueError: the sizes differ; the text names the leaf, and how to say that all examples
        share it.
    """
    rows = _count_rows(leaves, plan)
    if not rows:
        return []
    most = rows[0][1]
    if any(n != most for _, n in rows):
        counts = Counter(n for _, n in rows)
        most = max(counts, key=counts.__getitem__)
        path, odd = next(row for row in rows if row[1] != most)
        like = next(name_leaf(path) for path, n in rows if n == most)
        raise ValueError(
            f"{name_leaf(path)} has {odd} rows, but {like} has {most}: all leaves of a batch "
            "need one row for each example. What all examples share (class weights) is "
            f"declared, {_explain_sharing(path)}"
        )
    if most == 0:
        raise ValueError(f"{name_leaf(rows[0][0])} has no rows: a batch needs at least one example")
    return rows


def share_of_real(mask: Any, plan: Plan) -> float:
    """Return the share of real examples of a mask on the host; refuse values other than 0 and 1."""
    host = np.asarray(mask)
    if host.ndim != 1:
        return 1.0
    wrong = host[(host != 0) & (host != 1)]
    if wrong.size and "mask" not in plan.batch:
        raise ValueError(
            f"batch['mask'] needs 1 for real examples and 0 for padding, got {wrong[0]!s}: give "
            "weights in a leaf of another name, to tx.example_mean(..., weights=...)"
        )
    return int(np.count_nonzero(host)) / max(host.size, 1)


def explain_missing_rows(where: str, leaf: Any) -> str:
    """Return the error's text for a leaf without a dim of examples."""
    kind = "a scalar array" if hasattr(leaf, "shape") else f"a Python {type(leaf).__name__}"
    return (
        f"{where} needs to be an array with one row for each example, got {kind}: lists and tuples "
        "are taken apart, so write numpy.asarray; what is the same for all examples is declared by "
        "Plan(batch={name: PartitionSpec()})"
    )


def global_shapes(shard: Any, mesh: MeshSpec, plan: Plan) -> Any:
    """Return the shapes of the global batch on a mesh from those of one data shard.

    Args:
      shard: pytree of arrays or shapes: the part of each leaf that one data shard gets. Its other
        dims are whole (the sequence too, where the plan splits it).
      mesh: the mesh; its devices need not be here.
      plan: the plan.

    Returns:
      `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      ValueError: a dim is not divisible by the devices that share it, a leaf has no dim or
        another number of rows than the others, or the batch is empty.
    """

    def shape(path: Any, leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        leaf = leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else np.asarray(leaf)
        sizes = list(leaf.shape)
        for dim, axes in zip(range(len(sizes)), map(entry_axes, spec), strict=False):
            sizes[dim] *= math.prod(mesh.shape[a] for a in axes if a in plan.row_axes)
        sharding = NamedSharding(mesh.mesh, spec)
        check_divisible(tuple(sizes), sharding, path, parts=1)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(tuple(sizes), dtype, sharding=sharding)

    check_rows(leaves_of(shard), plan)
    return jax.tree_util.tree_map_with_path(shape, shard, plan.batch_specs(shard, mesh))


def check_divisible(shape: tuple[int, ...], sharding: NamedSharding, path: Any, parts: int) -> None:
    """Refuse a leaf with a dim that the devices along its axes cannot share equally."""
    mesh, spec = sharding.mesh, sharding.spec
    if len(shape) < len(spec):
        raise ValueError(
            f"{name_leaf(path)} needs at least {len(spec)} dims to be sharded by {spec}, got shape "
            f"{shape}"
        )
    for dim, entry in enumerate(spec):
        axes = entry_axes(entry)
        size = math.prod(mesh.shape[a] for a in axes)
        length = shape[dim] * (parts if dim == 0 else 1)
        if length % size:
            names = ", ".join(map(repr, axes))
            what = "examples" if dim == 0 else f"in dim {dim}"
            raise ValueError(
                f"{name_leaf(path)} has {length} {what}, which {size} devices along axis {names} "
                f"cannot share equally: use a size divisible by {size}, or pad it (and set the "
                "mask)"
            )


def count_parts(sharding: NamedSharding) -> int:
    """Return the number of processes whose parts make up the rows of a leaf.

    Processes along an axis that does not shard the rows give the same rows, and count once.
    """
    if jax.process_count() == 1 or not sharding.spec:
        return 1
    axes = entry_axes(sharding.spec[0])
    size = math.prod(sharding.mesh.shape[a] for a in axes)
    rows = NamedSharding(sharding.mesh, PartitionSpec(axes)).devices_indices_map((size,))
    here = {
        index for device, index in _shard_starts(rows) if device in sharding.addressable_devices
    }
    return size // max(len(here), 1)


def _shard_starts(rows: Mapping[jax.Device, Any]) -> list[tuple[jax.Device, int]]:
    return [(device, index[0].start or 0) for device, index in rows.items()]
