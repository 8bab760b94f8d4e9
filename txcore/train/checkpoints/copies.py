"""Read leaves of which each device has its own copy on another number of devices."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from txcore.train.checkpoints.manifest import CheckpointError, Leaf
from txcore.train.state.state import TrainState

MOST_COPIES = 1 << 20
_COUNT = re.compile(r"\[(\d+)")


def paths_of(state: TrainState) -> frozenset[str]:
    """Return the paths of the leaves of which each device has its own copy (`Kept.copies`)."""
    engine = state.owner.engine
    if engine is None or state.comm_state is None:
        return frozenset()
    found = jax.tree_util.tree_flatten_with_path(engine.kept(state.stored_params))[0]
    copied = [path for path, kept in found if kept.copies is not None]
    return frozenset(f"comm_state{jax.tree_util.keystr(path)}" for path in copied)


def without_count(leaf: Leaf) -> Leaf:
    """Return a leaf whose type has the word "copies" in place of their number."""
    return Leaf(leaf.path, _COUNT.sub("[copies", leaf.kind, count=1))


def shape_to_read(leaf: Leaf, own: jax.Array) -> jax.ShapeDtypeStruct:
    """Return the shape and sharding to read a leaf with: it has as many copies as were saved.

    They are read as the state's own where there are as many; else each device gets its share of
    them, or all where the devices do not divide them.
    """
    found = _COUNT.search(leaf.kind)
    count = int(found[1]) if found else 0
    if not 0 < count <= MOST_COPIES:
        raise CheckpointError(
            f"{leaf.path} needs from 1 to {MOST_COPIES} copies, got {leaf.kind}: use another "
            "checkpoint"
        )
    if count == own.shape[0]:
        return jax.ShapeDtypeStruct(own.shape, own.dtype, sharding=own.sharding)
    sharding = auto_sharding(own)
    if count % (own.shape[0] // sharding.shard_shape(own.shape)[0]):
        sharding = NamedSharding(sharding.mesh, P(None, *sharding.spec[1:]))
    return jax.ShapeDtypeStruct((count, *own.shape[1:]), own.dtype, sharding=sharding)


def share_mean(read: jax.Array, own: jax.Array) -> jax.Array:
    """Return as many copies as the state has, each of them the mean of those that were saved.

    So their mean stays what it was: of what a compression has left over, that is what the devices'
    gradients still lack.
    """
    mean = jax.jit(
        lambda x: jnp.broadcast_to(x.mean(0, keepdims=True).astype(x.dtype), own.shape),
        out_shardings=auto_sharding(own),
    )
    return jax.device_put(mean(read), own.sharding)


def auto_sharding(x: jax.Array) -> NamedSharding:
    """Return an array's sharding on a mesh over whose axes jax may reshard by itself."""
    assert isinstance(x.sharding, NamedSharding)
    mesh = x.sharding.mesh
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names, axis_types=types), x.sharding.spec)
