"""Place batches on the mesh; what depends on their structure alone is found once."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from txcore import _compat
from txcore.mesh import MeshSpec
from txcore.plan.batch_specs import top_key
from txcore.plan.plan import Plan
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

_ARRAYS = {_compat.array_type()}


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


class Stacked(NamedTuple):
    """Hold the batches of several steps on the mesh, one after the other along a first dim.

    Attributes:
      tree: its arrays, of shape (steps, rows, ...).
      form: as in `Placed`, of the stacked arrays.
      rows: as in `Placed`, of each step.
      real: as in `Placed`, of each step.
    """

    tree: Any
    form: int
    rows: int
    real: tuple[int, ...]


class Copied(NamedTuple):
    """Hold a batch on the host, or on devices, of which the caller may refill its own buffers."""

    tree: Any
    rows: int


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
      parts: the processes that give different rows, where their parts are not placed yet.
      form: as in `Placed`; None until one was placed.
    """

    paths: list[Any]
    shardings: list[NamedSharding]
    there: bool
    rows: int
    first: int | None
    mask: int | None
    parts: int
    form: int | None = None


class _Lying(NamedTuple):
    """Know batches like the last one that lay on the mesh already.

    Attributes:
      treedef: the batch's structure.
      kinds: each leaf's type, its abstract value, and where it lies.
      counts: all of `Placed` but the tree.
    """

    treedef: Any
    kinds: list[tuple[Any, Any, Any]]
    counts: tuple[int, int, int, int]

    def is_like(self, batch: Any) -> bool:
        """Tell whether a batch is of the same structure, shapes and dtypes, and lies alike."""
        leaves: list[Any]
        leaves, treedef = jax.tree.flatten(batch)
        if treedef != self.treedef:
            return False
        for leaf, (kind, aval, sharding) in zip(leaves, self.kinds, strict=True):
            # jax gives arrays of one shape and dtype one abstract value.
            if type(leaf) is not kind or leaf.aval is not aval:
                return False
            if leaf.sharding is not sharding and leaf.sharding != sharding:
                return False
        return True


class Placer:
    """Place batches on a mesh as a plan says, and remember what their structure decides."""

    def __init__(self, mesh: MeshSpec, plan: Plan) -> None:
        self._mesh, self._plan = mesh, plan
        self._structures: dict[Any, _Structure] = {}
        self._forms: dict[Any, int] = {}  # of what was placed
        self._newest: _Lying | None = None
        self._numbers = itertools.count()  # not the forms' count: two threads may place

    def place(self, batch: Any) -> Placed:
        """Place a batch, as `shard_batch` says."""
        newest = self._newest
        if newest is not None and newest.is_like(batch):
            return Placed(batch, *newest.counts)
        leaves, treedef = jax.tree.flatten(batch)
        found = self._look_up(batch, leaves, treedef)
        share = 1.0 if found.mask is None else share_of_real(leaves[found.mask], self._plan)
        if not found.there:
            leaves = list(map(_place_leaf, leaves, found.shardings, found.paths))
            batch = jax.tree.unflatten(treedef, leaves)
        if found.form is None:
            form = treedef, tuple((x.shape, x.dtype) for x in leaves)
            found.form = self._forms.setdefault(form, next(self._numbers))
        examples = 1 if found.first is None else leaves[found.first].shape[0]
        placed = Placed(batch, found.form, found.rows, examples, round(examples * share))
        if found.there and leaves:
            kinds = [(type(x), x.aval, x.sharding) for x in leaves]
            self._newest = _Lying(treedef, kinds, placed[1:])
        return placed

    def copy(self, batch: Any) -> Copied:
        """Return a batch that shares no memory with the caller's."""
        own = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else _copy_of(x), batch)
        return Copied(own, self.rows(batch))

    def stack(self, batches: Sequence[Any]) -> Stacked | None:
        """Place the batches of several steps as one; None where they are not alike.

        Args:
          batches: at least one; host arrays are stacked there, and sent together.
        """
        flat = [jax.tree.flatten(batch) for batch in batches]
        found = [self._look_up(b, *f) for b, f in zip(batches, flat, strict=True)]
        first = found[0]
        if any(other is not first for other in found):
            return None
        leaves = [leaves for leaves, _ in flat]
        size = 1 if first.first is None else leaves[0][first.first].shape[0] * first.parts
        real = [size] * len(leaves)
        if first.mask is not None:
            real = [round(size * share_of_real(own[first.mask], self._plan)) for own in leaves]
        columns = zip(zip(*leaves, strict=True), first.shardings, first.paths, strict=True)
        stacked = [_stack_leaf(column, sharding, path) for column, sharding, path in columns]
        form = flat[0][1], tuple((x.shape, x.dtype) for x in stacked)
        number = self._forms.setdefault(form, next(self._numbers))
        tree = jax.tree.unflatten(flat[0][1], stacked)
        return Stacked(tree, number, first.rows, tuple(real))

    def rows(self, batch: Any) -> int:
        """Return the rows of the global batch, from this process's part of it."""
        return self._look_up(batch, *jax.tree.flatten(batch)).rows

    def _look_up(self, batch: Any, leaves: list[Any], treedef: Any) -> _Structure:
        try:
            kinds: Any = tuple([(x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves])
        except AttributeError:  # a Python number
            kinds = tuple((getattr(x, "shape", type(x)), getattr(x, "dtype", None)) for x in leaves)
        key = treedef, kinds
        found = self._structures.get(key)
        if found is None:
            found = self._structures[key] = self._find_structure(batch)
        return found

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
        return _Structure(paths, shardings, there, count, first, mask, 1 if there else parts)


def holds_arrays_alone(batch: Any) -> bool:
    """Tell whether every leaf of a batch is an array of jax's, and no tracer; about 0.3 us."""
    kind = type(batch)
    if kind is dict:
        kinds = set(map(type, batch.values()))
    elif kind is tuple or kind is list:
        kinds = set(map(type, batch))
    else:
        kinds = {kind}
    if kinds == _ARRAYS:
        return True
    leaves = jax.tree.leaves(batch)
    return bool(leaves) and set(map(type, leaves)) == _ARRAYS


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
    host = in_native_order(_copy_of(leaf))
    _check_leaf(host, leaf, sharding, path)
    return _send(host, sharding)


def _copy_of(leaf: Any) -> np.ndarray:
    """Copy an array of the host; torch's tensors do not know numpy's keyword for it."""
    return np.array(np.asarray(leaf))


def _check_leaf(host: np.ndarray, leaf: Any, sharding: NamedSharding, path: Any) -> None:
    """Refuse what is no array of numbers, and what its devices cannot share."""
    if host.dtype.kind not in "biufcV":  # V: those of ml_dtypes, bfloat16 for one
        raise TypeError(
            f"{name_leaf(path)} needs numbers, got {host.dtype}: encode it, or leave it out of the "
            "batch"
        )
    if not host.shape and any(sharding.spec):
        raise ValueError(explain_missing_rows(name_leaf(path), leaf))
    # Several processes give their own parts, which their own devices share.
    check_divisible(host.shape, sharding, path, count_parts(sharding))


def _send(host: np.ndarray, sharding: NamedSharding, *, steps: bool = False) -> jax.Array:
    """Send an array to its devices; with `steps` its first dim is that of several steps."""
    over = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec)) if steps else sharding
    if jax.process_count() == 1:
        return jax.device_put(host, over)
    # Its own rows, and of those all: a sequence is cut here.
    shape, dim = list(host.shape), int(steps)
    if len(shape) > dim:
        shape[dim] *= count_parts(sharding)
    return jax.make_array_from_process_local_data(over, host, tuple(shape))


def _stack_leaf(leaves: Sequence[Any], sharding: NamedSharding, path: Any) -> jax.Array:
    """Place one leaf of several batches."""
    if any(isinstance(leaf, jax.Array) for leaf in leaves):
        # With one device along an axis a leaf may lie right by another spec.
        placed = [jax.device_put(_place_leaf(x, sharding, path), sharding) for x in leaves]
        return _stack_on(sharding)(placed)
    host = in_native_order(np.stack([np.asarray(leaf) for leaf in leaves]))
    _check_leaf(host[0], leaves[0], sharding, path)
    return _send(host, sharding, steps=True)


@lru_cache(maxsize=64)
def _stack_on(sharding: NamedSharding) -> Callable[[list[jax.Array]], jax.Array]:
    """Return a function that stacks arrays where they lie: nothing is sent."""
    over = PartitionSpec(None, *sharding.spec)
    mapped = jax.shard_map(
        lambda parts: jnp.stack(parts), mesh=sharding.mesh, in_specs=sharding.spec, out_specs=over
    )
    return jax.jit(mapped)
