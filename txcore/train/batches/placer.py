"""Place batches on the mesh; what depends on their structure alone is found once."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from txcore.mesh import MeshSpec
from txcore.plan.plan import Plan, top_key
from txcore.train.batches.batch import (
    check_divisible,
    check_rows,
    count_parts,
    explain_missing_rows,
    leaves_of,
    name_leaf,
    share_of_real,
)
from txcore.train.replicas.copies import in_native_order


class Placed(NamedTuple):
    """Hold a batch on the mesh.

    Attributes:
      tree: its arrays, global and sharded.
      form: a number that is the same for the same structure, shapes and dtypes.
      rows: those of the global batch: the rows of this process, times the number of processes
        that give different ones.
      examples: rows of the global batch.
      real: those without padding. With several processes it is estimated from this process's
        mask, so that measuring throughput needs no communication.
    """

    tree: Any
    form: int
    rows: int
    examples: int
    real: int


@dataclass
class _Structure:
    """Hold what all batches of one structure, shapes, dtypes and placement share.

    Attributes:
      paths: the leaves' paths.
      shardings: where each leaf is to lie.
      there: whether all of them lie there already.
      rows: as in `Placed`.
      first: the index of the first leaf with examples.
      mask: the index of the mask if it is on the host.
      form: as in `Placed`; None until one was placed.
    """

    paths: list[Any]
    shardings: list[NamedSharding]
    there: bool
    rows: int
    first: int | None
    mask: int | None
    form: int | None = None


class Placer:
    """Place batches on a mesh as a plan says, and remember what their structure decides."""

    def __init__(self, mesh: MeshSpec, plan: Plan) -> None:
        self._mesh, self._plan = mesh, plan
        self._structures: dict[Any, _Structure] = {}
        self._forms: dict[Any, int] = {}  # of what was placed

    def place(self, batch: Any) -> Placed:
        """Place a batch, as `shard_batch` says."""
        leaves, treedef, found = self._look_up(batch)
        share = 1.0 if found.mask is None else share_of_real(leaves[found.mask], self._plan)
        if not found.there:
            leaves = list(map(_place_leaf, leaves, found.shardings, found.paths))
            batch = jax.tree.unflatten(treedef, leaves)
        if found.form is None:
            form = treedef, tuple((x.shape, x.dtype) for x in leaves)
            found.form = self._forms.setdefault(form, len(self._forms))
        examples = 1 if found.first is None else leaves[found.first].shape[0]
        return Placed(batch, found.form, found.rows, examples, round(examples * share))

    def rows(self, batch: Any) -> int:
        """Return the rows of the global batch, from this process's part of it."""
        return self._look_up(batch)[2].rows

    def _look_up(self, batch: Any) -> tuple[list[Any], Any, _Structure]:
        leaves, treedef = jax.tree.flatten(batch)
        try:
            kinds: Any = tuple([(x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves])
        except AttributeError:  # a Python number
            kinds = tuple((getattr(x, "shape", type(x)), getattr(x, "dtype", None)) for x in leaves)
        key = treedef, kinds
        found = self._structures.get(key)
        if found is None:
            found = self._structures[key] = self._find_structure(batch)
        return leaves, treedef, found

    def _find_structure(self, batch: Any) -> _Structure:
        """Find what a batch's structure decides; refuse rows that do not fit."""
        leaves = leaves_of(batch)
        rows = check_rows(leaves, self._plan)
        specs = jax.tree.leaves(
            self._plan.batch_specs(batch, self._mesh),
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
        shardings = [NamedSharding(self._mesh.mesh, spec) for spec in specs]
        paths = [path for path, _ in leaves]
        first = next((i for i, path in enumerate(paths) if rows and path == rows[0][0]), None)
        mask = next((i for i, path in enumerate(paths) if top_key(path) == "mask"), None)
        if mask is not None and isinstance(leaves[mask][1], jax.Array):
            mask = None
        there = all(_is_placed(x, s) for (_, x), s in zip(leaves, shardings, strict=True))
        parts = 1 if first is None else count_parts(shardings[first])
        count = (rows[0][1] if rows else 1) * parts
        return _Structure(paths, shardings, there, count, first, mask)


def shard_batch(batch: Any, mesh: MeshSpec, plan: Plan) -> Any:
    """Place a batch on the mesh's devices as the plan says.

    Args:
      batch: pytree of host arrays; the leading dim is the global batch in one process, this
        process's part of it in several, and the other dims are whole. They are copied, so the
        caller may refill a buffer at once. Arrays that lie on the mesh in the right layout are
        taken as they are.
      mesh: the mesh.
      plan: the plan.

    Returns:
      Global arrays, sharded.

    Raises:
      ValueError: a dim is not divisible by the devices that share it, a leaf has no dim or
        another number of rows than the others, the batch is empty, or its mask is not 0 and 1.
    """
    return Placer(mesh, plan).place(batch).tree


def _is_placed(leaf: Any, sharding: NamedSharding) -> bool:
    """Tell whether a leaf is an array that lies where it is to lie."""
    return (
        isinstance(leaf, jax.Array)
        and isinstance(leaf.sharding, NamedSharding)
        and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    )


def _place_leaf(leaf: Any, sharding: NamedSharding, path: Any) -> jax.Array:
    if _is_placed(leaf, sharding):
        return leaf
    # A copy, since on CPU jax would use the caller's memory itself while steps are under way.
    host = in_native_order(np.array(leaf))
    if host.dtype.kind not in "biufcV":  # V: those of ml_dtypes, bfloat16 for one
        raise TypeError(
            f"{name_leaf(path)} needs numbers, got {host.dtype}: encode it, or leave it out of the "
            "batch"
        )
    if not host.shape and any(sharding.spec):
        raise ValueError(explain_missing_rows(name_leaf(path), leaf))
    # Several processes give their own parts, which their own devices share.
    parts = count_parts(sharding)
    check_divisible(host.shape, sharding, path, parts)
    if jax.process_count() == 1:
        return jax.device_put(host, sharding)
    # Its own rows, and of those all: a sequence is cut here.
    shape = (host.shape[0] * parts, *host.shape[1:]) if host.shape else ()
    return jax.make_array_from_process_local_data(sharding, host, shape)
