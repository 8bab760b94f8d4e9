"""How the leaves of a batch lie on the mesh."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from txcore.layout import drop_axes
from txcore.mesh import MeshSpec


def batch_specs(plan: Any, batch: Any, mesh: MeshSpec) -> Any:
    """Return what `Plan.batch_specs` says."""
    alone = axes_of_one_device(mesh)
    rows = drop_axes(P(plan.row_axes) if plan.row_axes else P(), alone)
    sequences = rows
    if plan.context is not None and plan.context not in alone:
        sequences = P(rows[0] if len(rows) else None, plan.context)
    declared = {key: drop_axes(spec, alone) for key, spec in plan.batch.items()}

    def spec(path: Any, leaf: Any) -> P:
        has_sequence = len(getattr(leaf, "shape", ())) > 1
        return declared.get(top_key(path), sequences if has_sequence else rows)

    keys = {top_key(path) for path, _ in jax.tree_util.tree_flatten_with_path(batch)[0]}
    if unknown := sorted(set(plan.batch) - keys):
        raise ValueError(
            f"Plan(batch=...) declares {', '.join(map(repr, unknown))}, but the batch has "
            f"{', '.join(sorted(map(repr, keys)))} at its top: name those"
        )
    return jax.tree_util.tree_map_with_path(spec, batch)


def axes_of_one_device(mesh: MeshSpec) -> frozenset[str]:
    """Return the mesh's axes that have one device."""
    return frozenset(axis for axis, size in mesh.shape.items() if size == 1)


def top_key(path: Any) -> str:
    """Return the first key of a leaf's path: a dict's key or a field's name, else ""."""
    entry = path[0] if path else None
    key = getattr(entry, "key", getattr(entry, "name", ""))
    return key if isinstance(key, str) else ""
