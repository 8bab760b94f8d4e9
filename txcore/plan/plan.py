"""Plans: what is parallel over which mesh axis."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from txcore.collectives import _leaves
from txcore.mesh import MeshSpec
from txcore.printing import format_call


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
class Predicted:
    """Communication that a plan brings with it, of one step.

    Attributes:
      what: what is sent ("gradients").
      kind: HLO's name of the collective ("all-reduce").
      axes: the mesh axes, all of them of more than one device.
      dtype: jax's name of the dtype ("float32").
      elements: those of each array, as it enters into S.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    dtype: str
    elements: tuple[int, ...]

    @property
    def payload_bytes(self) -> int:
        """S as in nccl-tests: of an all-reduce, the bytes of the arrays on one device."""
        return sum(self.elements) * jax.numpy.dtype(self.dtype).itemsize


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

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {name: (value, None) for name, value in values.items() if value}
        return format_call("Plan", **given)

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

    def predict(self, params: Any, mesh: MeshSpec) -> tuple[Predicted, ...]:
        """Predict what the plan itself makes a training step communicate.

        The loss, metrics and whatever else a step reduces come on top.

        Args:
          params: pytree of the parameters, arrays or `jax.ShapeDtypeStruct`s. Gradients have
            their dtypes, whatever the precision policy computes in (see `tx.Precision`), and
            float16 is averaged as float32; integers have none.
          mesh: the devices and their axes.

        Returns:
          For data parallelism one all-reduce of the gradients over the data axes for each dtype;
          nothing over axes of one device.

        Raises:
          ValueError: the plan names an axis that `mesh` does not have.

        Example:
          >>> mesh = tx.MeshSpec(jax.devices()[:2], axes=("data",))
          >>> params = {"w": np.zeros((3, 4), np.float32), "b": np.zeros(4, np.float32)}
          >>> for p in tx.Plan(data_parallel=tx.DP("data")).predict(params, mesh):
          ...     print(p.what, p.kind, p.axes, p.dtype, p.elements, p.payload_bytes)
          gradients all-reduce ('data',) float32 (4, 12) 64
        """
        self.validate(mesh)
        axes = self.active_data_axes(mesh)
        return _reduced_gradients(params, axes) if axes else ()

    def batch_specs(self, batch: Any, mesh: MeshSpec) -> Any:
        """Return the spec of each leaf of `batch`, with axes of size 1 left out."""
        whole = _without_size_one(P(self.data_axes) if self.data_axes else P(), mesh)
        declared = {key: _without_size_one(spec, mesh) for key, spec in self.batch.items()}

        def spec(path: Any, _: Any) -> P:
            return declared.get(top_key(path), whole)

        keys = {top_key(path) for path, _ in jax.tree_util.tree_flatten_with_path(batch)[0]}
        if unknown := sorted(set(self.batch) - keys):
            raise ValueError(
                f"Plan(batch=...) declares {', '.join(map(repr, unknown))}, but the batch has "
                f"{', '.join(sorted(map(repr, keys)))} at its top: name those"
            )
        return jax.tree_util.tree_map_with_path(spec, batch)


def _reduced_gradients(params: Any, axes: tuple[str, ...]) -> tuple[Predicted, ...]:
    sizes: dict[str, list[int]] = {}
    for leaf in jax.tree.leaves(jax.eval_shape(lambda tree: tree, params)):
        if leaf.size and jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact):
            sizes.setdefault(_leaves.mean_dtype(leaf.dtype).name, []).append(leaf.size)
    return tuple(
        Predicted("gradients", "all-reduce", axes, dtype, tuple(elements))
        for dtype, elements in sizes.items()
    )


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
