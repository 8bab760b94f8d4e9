"""A batch: which of its leaves hold examples, and how it is placed on the mesh."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from txcore.mesh import MeshSpec
from txcore.plan.plan import Plan, top_key
from txcore.train.replicas.copies import in_native_order

Leaves = list[tuple[Any, Any]]  # of a batch, each with its path


def examples(batch: Any, plan: Plan) -> tuple[int, Any]:
    """Return how many examples `batch` holds, and its mask (None where all are real).

    Examples lie along the leading dim of those leaves that the plan shards there over its data
    axes; the mask is the leaf "mask" of shape (batch,) at the top of a dict, named tuple or
    dataclass.
    """
    leaves = _leaves(batch)
    rows, mask = _rows(leaves, plan), _mask(leaves)
    return (rows[0][1] if rows else 1), None if np.ndim(mask) != 1 else mask


def mask_of(batch: Any) -> Any:
    """Return the leaf "mask" at the top of a batch, of any shape, or None."""
    return _mask(_leaves(batch))


def _leaves(batch: Any) -> Leaves:
    return jax.tree_util.tree_flatten_with_path(batch)[0]


def _mask(leaves: Leaves) -> Any:
    return next((leaf for path, leaf in leaves if top_key(path) == "mask"), None)


def _rows(leaves: Leaves, plan: Plan) -> list[tuple[Any, int]]:
    """Return path and leading size of each leaf that holds examples; refuse what has none."""
    found = []
    for path, leaf in leaves:
        if not _holds_examples(top_key(path), plan):
            continue
        shape = getattr(leaf, "shape", ())
        if not shape:
            raise ValueError(_no_rows(_name(path), leaf))
        found.append((path, int(shape[0])))
    return found


def _name(path: Any) -> str:
    """Return what errors call a leaf; not made for each leaf of each step."""
    return f"batch{jax.tree_util.keystr(path)}"


def _holds_examples(key: str, plan: Plan) -> bool:
    """Tell whether a leaf has one row for each example, as far as the plan says."""
    if key not in plan.batch:
        return True
    spec = plan.batch[key]
    return bool(plan.data_axes) and bool(spec) and set(_axes_of(spec[0])) == set(plan.data_axes)


def _declared(path: Any) -> str:
    """Return what to write of a leaf that all examples share."""
    key = top_key(path)
    if key:
        return f"Plan(batch={{{key!r}: P()}})"
    return "as a leaf of a dict batch, by Plan(batch={key: P()})"


def _check_rows(leaves: Leaves, plan: Plan) -> list[tuple[Any, int]]:
    """Return path and leading size of each leaf that holds examples, all equal.

    Raises:
      ValueError: naming the leaf, and how the plan says that all examples share it.
    """
    rows = _rows(leaves, plan)
    if not rows:
        return []
    most = rows[0][1]
    if any(n != most for _, n in rows):
        counts = Counter(n for _, n in rows)
        most = max(counts, key=counts.__getitem__)
        path, odd = next(row for row in rows if row[1] != most)
        like = next(_name(path) for path, n in rows if n == most)
        raise ValueError(
            f"{_name(path)} has {odd} rows, but {like} has {most}: all leaves of a batch "
            "need one row for each example. What all examples share (class weights) is "
            f"declared, {_declared(path)}"
        )
    if most == 0:
        raise ValueError(f"{_name(rows[0][0])} has no rows: a batch needs at least one example")
    return rows


def _share_of_real(mask: Any, plan: Plan) -> float:
    """Return the share of real examples by a mask on the host; refuse one but of 0 and 1."""
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


def _no_rows(where: str, leaf: Any) -> str:
    kind = "a scalar array" if hasattr(leaf, "shape") else f"a Python {type(leaf).__name__}"
    return (
        f"{where} needs to be an array with one row for each example, got {kind}: lists and tuples "
        "are taken apart, so write numpy.asarray; what is the same for all examples is declared by "
        "Plan(batch={name: PartitionSpec()})"
    )


class Placed(NamedTuple):
    """A batch on the mesh.

    Attributes:
      tree: its arrays, global and sharded.
      form: the same number for the same structure, shapes and dtypes.
      rows: rows of the global batch as the given ones say: those of a process times its number.
      examples: rows of the global batch.
      real: those that are no padding. In several processes it is an estimate by this process's
        mask: throughput needs no communication of its own.
    """

    tree: Any
    form: int
    rows: int
    examples: int
    real: int


@dataclass(frozen=True)
class _Structure:
    """What is known of all batches of the same structure, shapes, dtypes and places.

    Attributes:
      paths: the leaves' paths.
      shardings: where each leaf is to lie.
      there: whether all of them lie there already.
      rows: how many rows a leaf with examples has, as given; 1 if there is none.
      first: the index of the first leaf with examples.
      mask: the index of the mask if it is on the host.
    """

    paths: list[Any]
    shardings: list[NamedSharding]
    there: bool
    rows: int
    first: int | None
    mask: int | None


class Placer:
    """Place batches on a mesh as a plan says; what their structure decides is found once."""

    def __init__(self, mesh: MeshSpec, plan: Plan) -> None:
        self._mesh, self._plan = mesh, plan
        self._structures: dict[Any, _Structure] = {}
        self._forms: dict[Any, int] = {}  # of what was placed
        self._form_of: dict[Any, int] = {}  # of what was given

    def place(self, batch: Any) -> Placed:
        """Place a batch, as `shard_batch` says."""
        key, leaves, found = self._look_up(batch)
        share = 1.0 if found.mask is None else _share_of_real(leaves[found.mask], self._plan)
        if not found.there:
            leaves = list(map(_place, leaves, found.shardings, found.paths))
            batch = jax.tree.unflatten(key[0], leaves)
        form = self._form_of.get(key)
        if form is None:
            placed = key[0], tuple((x.shape, x.dtype) for x in leaves)
            form = self._form_of[key] = self._forms.setdefault(placed, len(self._forms))
        examples = 1 if found.first is None else leaves[found.first].shape[0]
        rows = found.rows * jax.process_count()
        return Placed(batch, form, rows, examples, round(examples * share))

    def rows(self, batch: Any) -> int:
        """Return the rows of the global batch of which `batch` is this process's part."""
        return self._look_up(batch)[2].rows * jax.process_count()

    def _look_up(self, batch: Any) -> tuple[Any, list[Any], _Structure]:
        leaves, treedef = jax.tree.flatten(batch)
        try:
            kinds: Any = tuple([(x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves])
        except AttributeError:  # a number of Python's
            kinds = tuple((getattr(x, "shape", type(x)), getattr(x, "dtype", None)) for x in leaves)
        key = treedef, kinds
        found = self._structures.get(key)
        if found is None:
            found = self._structures[key] = self._find_structure(batch)
        return key, leaves, found

    def _find_structure(self, batch: Any) -> _Structure:
        """Find what a batch's structure decides; refuse rows that do not fit."""
        leaves = _leaves(batch)
        rows = _check_rows(leaves, self._plan)
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
        there = all(_lies(x, s) for (_, x), s in zip(leaves, shardings, strict=True))
        return _Structure(paths, shardings, there, rows[0][1] if rows else 1, first, mask)


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
      ValueError: a dim is not divisible by the devices that share it, a leaf has no dim or
        another number of rows than the others, the batch is empty, or its mask is not 0 and 1.
    """
    return Placer(mesh, plan).place(batch).tree


def global_shapes(shard: Any, mesh: MeshSpec, plan: Plan) -> Any:
    """Return the shapes of the global batch of which `shard` is one data shard, on the mesh.

    Args:
      shard: pytree of arrays or shapes: what one member of the data axes gets of each leaf.
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
        for dim, axes in zip(range(len(sizes)), map(_axes_of, spec), strict=False):
            sizes[dim] *= math.prod(mesh.shape[a] for a in axes if a in plan.data_axes)
        sharding = NamedSharding(mesh.mesh, spec)
        _check_divisible(tuple(sizes), sharding, path, processes=1)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(tuple(sizes), dtype, sharding=sharding)

    _check_rows(_leaves(shard), plan)
    return jax.tree_util.tree_map_with_path(shape, shard, plan.batch_specs(shard, mesh))


def shapes_on(arrays: Any, mesh: MeshSpec) -> Any:
    """Return the shapes of arrays, laid out on `mesh` as they are on their own."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.sharding(*x.sharding.spec)),
        arrays,
    )


def _lies(leaf: Any, sharding: NamedSharding) -> bool:
    """Tell whether a leaf is an array that lies where it is to lie."""
    return (
        isinstance(leaf, jax.Array)
        and isinstance(leaf.sharding, NamedSharding)
        and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    )


def _place(leaf: Any, sharding: NamedSharding, path: Any) -> jax.Array:
    if _lies(leaf, sharding):
        return leaf
    # A copy, since on CPU jax would use the caller's memory itself while steps are under way.
    host = in_native_order(np.array(leaf))
    if host.dtype.kind not in "biufcV":  # V: those of ml_dtypes, bfloat16 for one
        raise TypeError(
            f"{_name(path)} needs numbers, got {host.dtype}: encode it, or leave it out of the "
            "batch"
        )
    if not host.shape and any(sharding.spec):
        raise ValueError(_no_rows(_name(path), leaf))
    # Several processes give only their own part, which their own devices share.
    _check_divisible(host.shape, sharding, path, jax.process_count())
    if jax.process_count() == 1:
        return jax.device_put(host, sharding)
    return jax.make_array_from_process_local_data(sharding, host)


def _check_divisible(
    shape: tuple[int, ...], sharding: NamedSharding, path: Any, processes: int
) -> None:
    mesh, spec = sharding.mesh, sharding.spec
    if len(shape) < len(spec):
        raise ValueError(
            f"{_name(path)} needs at least {len(spec)} dims to be sharded by {spec}, got shape "
            f"{shape}"
        )
    for dim, entry in enumerate(spec):
        axes = _axes_of(entry)
        size = math.prod(mesh.shape[a] for a in axes)
        length = shape[dim] * (processes if dim == 0 else 1)
        if length % size:
            names = ", ".join(map(repr, axes))
            what = "examples" if dim == 0 else f"in dim {dim}"
            raise ValueError(
                f"{_name(path)} has {length} {what}, which {size} devices along axis {names} "
                f"cannot share equally: use a size divisible by {size}, or pad it (and set the "
                "mask)"
            )


def _axes_of(entry: Any) -> tuple[str, ...]:
    """Return the axes that one entry of a PartitionSpec names."""
    return tuple(a for a in (entry if isinstance(entry, tuple) else (entry,)) if a is not None)
