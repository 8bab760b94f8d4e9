"""Layers of a pipeline that are saved in other chunks than a state stores them in.

`params["blocks"]` is stored as (layers, ...), or where a stage has several chunks as (chunks,
layers / chunks, ...): the same numbers in the same order. So do moments and whatever else mirrors
the parameters.
"""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from txcore.layout import axes_of
from txcore.train.checkpoints import copies
from txcore.train.checkpoints.manifest import Leaf
from txcore.train.state.state import TrainState

_BLOCKS = "['blocks']"


def count_stacked_dims(state: TrainState) -> int:
    """Return how many dims of a state's layers count them: 1, or 2 with several chunks a stage."""
    engine = state.owner.engine
    pipeline = None if engine is None else engine.plan.pipeline
    return 1 if pipeline is None or pipeline.chunks == 1 else 2


def as_stacked_here(saved: Leaf, kind: str | None, dims: int) -> Leaf:
    """Return a saved leaf with the type of a state's, if both are the same layers.

    Args:
      saved: the leaf; of copies, without their count.
      kind: the type of the state's leaf of that path, None if there is none.
      dims: how many dims of it count layers.
    """
    if kind is None or not is_same(saved.path, saved.kind, kind, dims):
        return saved
    return Leaf(saved.path, kind)


def is_same(path: str, saved: str, own: str, dims: int) -> bool:
    """Tell whether two types, such as "float32[8, 4]" and "float32[2, 4, 4]", are the same layers.

    Args:
      path: of the leaf.
      saved: the type in a checkpoint; its first dim may be "copies".
      own: the type of a state's leaf.
      dims: how many dims of the state's count layers, after that of the copies.
    """
    (dtype, before), (own_dtype, here) = _parse_kind(saved), _parse_kind(own)
    if not _is_of_blocks(path) or dtype != own_dtype:
        return False
    if "copies" in (*before[:1], *here[:1]):
        if before[0] != here[0]:
            return False
        before, here = before[1:], here[1:]
    if not all(size.isdigit() for size in (*before, *here)):
        return False
    count, rest = math.prod(map(int, here[:dims])), here[dims:]
    stacked = len(before) - len(rest)
    return (
        stacked in (1, 2)
        and len(here) >= dims
        and before[stacked:] == rest
        and math.prod(map(int, before[:stacked])) == count
    )


def _is_of_blocks(path: str) -> bool:
    return _BLOCKS in path and not path.startswith("extra")


def _parse_kind(kind: str) -> tuple[str, list[str]]:
    dtype, _, sizes = kind.partition("[")
    return dtype, [size for size in sizes.rstrip("]").split(", ") if size]


def stacked_as_saved(saved: Leaf, own: jax.Array, dims: int, *, copied: bool) -> Any:
    """Return the shape and sharding in which a leaf of a state is read; the leaf if they are its.

    The devices read what they hold of the other dims, and of the layers as many as they can.

    Args:
      saved: the leaf.
      own: the state's.
      dims: how many dims of it count layers.
      copied: whether they come after that of the copies.
    """
    if not _is_of_blocks(saved.path):
        return own
    sizes, first = tuple(map(int, _parse_kind(saved.kind)[1])), int(copied)
    if sizes[first:] == own.shape[first:]:
        return own
    sharding = copies.auto_sharding(own)
    entries = [*sharding.spec, *[None] * (own.ndim - len(sharding.spec))]
    axes = axes_of(P(*entries[first : first + dims]))
    new_dims = len(sizes) - (own.ndim - dims)
    layers = sizes[first + new_dims - 1]
    split = layers % math.prod(sharding.mesh.shape[axis] for axis in axes) == 0
    stacked = [*[None] * (new_dims - 1), axes if axes and split else None]
    spec = P(*entries[:first], *stacked, *entries[first + dims :])
    shape = own.shape[:first] + sizes[first:]
    return jax.ShapeDtypeStruct(shape, own.dtype, sharding=NamedSharding(sharding.mesh, spec))


def stack_here(read: jax.Array, own: jax.Array) -> jax.Array:
    """Return layers that were read, in the shape and sharding of a state's."""
    if read.shape == own.shape:
        return read
    reshape: Any = jax.jit(lambda x: x.reshape(own.shape), out_shardings=copies.auto_sharding(own))
    return jax.device_put(reshape(read), own.sharding)
