"""Plans: what is parallel over which mesh axis."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from txcore.mesh import MeshSpec


@dataclass(frozen=True)
class DP:
    """Data parallelism: the batch is sharded over `axis`, gradients are averaged over it.

    Args:
      axis: mesh axis name, or a tuple of names that shard the batch together.

    Example:
      >>> tx.DP(axis="data").axes
      ('data',)
    """

    axis: str | tuple[str, ...]

    def __post_init__(self) -> None:
        axes = self.axes
        if not axes or not all(isinstance(a, str) for a in axes) or len(set(axes)) != len(axes):
            raise ValueError(
                f"DP needs axis= a mesh axis name or a tuple of different names, got {self.axis!r}"
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes as a tuple."""
        return self.axis if isinstance(self.axis, tuple) else (self.axis,)


@dataclass(frozen=True)
class Plan:
    """State what is parallel over which mesh axis.

    Args:
      data_parallel: `DP(axis)`, or None for a step that every device computes whole.
      batch: specs for leaves of the batch that are not simply sharded over the data axes in
        their first dim: `{"x": P("data", "model")}`, by the leaf's top-level key.

    Example:
      >>> plan = tx.Plan(data_parallel=tx.DP(axis="data"))
      >>> plan.data_axes
      ('data',)
    """

    data_parallel: DP | None = None
    batch: Mapping[str, P] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.data_parallel is not None and not isinstance(self.data_parallel, DP):
            raise TypeError(
                f"Plan needs data_parallel= a tx.DP or None, got {self.data_parallel!r}: write "
                "tx.Plan(data_parallel=tx.DP(axis=...))"
            )
        for key, spec in self.batch.items():
            if not isinstance(spec, P):
                raise TypeError(
                    f"Plan needs batch= PartitionSpecs by key, got {spec!r} for {key!r}: write "
                    f"jax.sharding.PartitionSpec({spec!r})"
                )

    @property
    def data_axes(self) -> tuple[str, ...]:
        """The axes over which the batch is sharded and gradients are averaged."""
        return self.data_parallel.axes if self.data_parallel is not None else ()

    def validate(self, mesh: MeshSpec) -> None:
        """Refuse a plan that names an axis that `mesh` does not have.

        Raises:
          ValueError: naming the axis and the mesh's axes.
        """
        for axis in self.data_axes:
            mesh.check_axis(axis, "Plan(data_parallel=DP(...))")
        for key, spec in self.batch.items():
            for axis in _spec_axes(spec):
                mesh.check_axis(axis, f"Plan(batch={{{key!r}: ...}})")

    def active_data_axes(self, mesh: MeshSpec) -> tuple[str, ...]:
        """Return the data axes that have more than one device."""
        return tuple(a for a in self.data_axes if mesh.shape[a] > 1)

    def batch_specs(self, batch: Any, mesh: MeshSpec) -> Any:
        """Return the spec of each leaf of `batch`, with axes of size 1 left out."""
        whole = P(self.data_axes) if self.data_axes else P()

        def spec(path: Any, _: Any) -> P:
            return _without_size_one(self.batch.get(top_key(path), whole), mesh)

        keys = {top_key(path) for path, _ in jax.tree_util.tree_flatten_with_path(batch)[0]}
        if unknown := sorted(set(self.batch) - keys):
            raise ValueError(
                f"Plan(batch=...) declares {', '.join(map(repr, unknown))}, but the batch has "
                f"{', '.join(sorted(map(repr, keys)))} at its top: name those"
            )
        return jax.tree_util.tree_map_with_path(spec, batch)


def top_key(path: Any) -> str:
    """Return the first key of a leaf's path: a dict's key or a field's name, else ""."""
    entry = path[0] if path else None
    key = getattr(entry, "key", getattr(entry, "name", ""))
    return key if isinstance(key, str) else ""


def _spec_axes(spec: P) -> list[str]:
    parts = [p if isinstance(p, tuple) else (p,) for p in spec if p is not None]
    return [a for part in parts for a in part]


def _without_size_one(spec: P, mesh: MeshSpec) -> P:
    def part(entry: Any) -> Any:
        axes = entry if isinstance(entry, tuple) else (entry,)
        kept = tuple(a for a in axes if a is not None and mesh.shape[a] > 1)
        return kept[0] if len(kept) == 1 else kept or None

    return P(*(part(entry) for entry in spec))
