"""Map a state's arrays to a checkpoint's: its files number them, its manifest names them.

Restoring finds them by name, since an OrderedDict may have been filled in another order. Arrays
without elements are in the manifest alone, and PRNG keys are saved as their key data.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore import _compat
from txcore.train.checkpoints import copies, layers, manifest
from txcore.train.checkpoints.manifest import CheckpointError, Leaf
from txcore.train.state.state import TrainState


def leaves_of(state: TrainState) -> tuple[Leaf, ...]:
    """Return the name and type of every array of a state, in the order in which it is saved."""
    found = jax.tree_util.tree_flatten_with_path(state.arrays)[0]
    leaves = []
    for path, x in found:
        name, kind = _path_of(path), kind_of(x)
        if name == "seed":  # its value counts too: a run with another seed is another run
            kind += f" {int(np.asarray(state.seed))}"
        leaves.append(Leaf(name, kind))
    return tuple(leaves)


def kind_of(x: Any) -> str:
    """Return an array's dtype and shape as a manifest holds them: "float32[3, 4]"."""
    return f"{x.dtype}{list(x.shape)}"


def leaves_to_compare(
    leaves: tuple[Leaf, ...], precision: str, copied: frozenset[str] = frozenset()
) -> tuple[Leaf, ...]:
    """Return the leaves and the precision that a checkpoint and a state have to share.

    Leaves out `loss_scaling`, which float16 always has, and other precisions only under "skip". Of
    the leaves of `copied` the number of copies does not count.
    """
    kept = [leaf for leaf in leaves if not leaf.path.startswith("loss_scaling.")]
    kept = [copies.without_count(leaf) if leaf.path in copied else leaf for leaf in kept]
    return (Leaf("precision", precision), *kept)


def examine_checkpoint(
    saved: Path, own: tuple[Leaf, ...], copied: frozenset[str] = frozenset(), stacked: int = 1
) -> tuple[str | None, dict[str, Any] | None]:
    """Return (why a checkpoint cannot be used, None), or (None, its position).

    Args:
      saved: the checkpoint's folder.
      own: the leaves of the state that it is for (`leaves_to_compare`).
      copied: the paths of those of which each device has its own copy.
      stacked: how many dims of a pipeline's layers count them (`layers.count_stacked_dims`).

    Raises:
      CheckpointError: it is whole, but of another model.
    """
    try:
        found = manifest.read_manifest(saved)
        manifest.verify_files(saved, found)
    except CheckpointError as error:
        return str(error), None
    theirs, kinds = leaves_to_compare(found.leaves, found.precision, copied), dict(own)
    theirs = tuple(layers.as_stacked_here(x, kinds.get(x.path), stacked) for x in theirs)
    if differs := manifest.describe_difference(theirs, own):
        raise CheckpointError(
            f"{saved} is of another model, optimizer, precision or seed: {differs}. Make the state "
            "that it was saved from, or give another folder"
        )
    return None, asdict(found.position)


def check_kinds(state: TrainState) -> None:
    """Refuse a state with an array that cannot be saved.

    Raises:
      CheckpointError: orbax's storage does not know its dtype.
    """
    import tensorstore  # orbax's own storage

    for name, x in _by_name(state).items():
        dtype = _as_numbers(x).dtype
        try:
            tensorstore.dtype(dtype.name)
        except (TypeError, ValueError):
            raise CheckpointError(
                f"{name} ({kind_of(x)}) cannot be saved: orbax does not store {dtype.name}. Keep "
                "it in another dtype, or train without checkpoints="
            ) from None


def arrays_to_save(state: TrainState) -> dict[str, jax.Array]:
    """Return the arrays by their numbers."""
    arrays = enumerate(jax.tree.leaves(state.arrays))
    return {array_number(i): _as_numbers(x) for i, x in arrays if x.size}


def shapes_to_read(saved: tuple[Leaf, ...], state: TrainState) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the arrays to read, by their numbers, with their shardings."""
    own, copied = _by_name(state), copies.paths_of(state)
    stacked = layers.count_stacked_dims(state)

    def shape_to_read(leaf: Leaf) -> jax.ShapeDtypeStruct:
        if leaf.path in own:
            x: Any = _as_numbers(own[leaf.path])
            x = layers.stacked_as_saved(leaf, x, stacked, copied=leaf.path in copied)
            if leaf.path in copied:
                return copies.shape_to_read(leaf, x)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        # A scalar of `loss_scaling` (see `facts`): read, since orbax reads all, and left out.
        dtype = leaf.kind.removesuffix("[]")
        return jax.ShapeDtypeStruct((), dtype, sharding=state.step.sharding)

    shapes = {array_number(i): shape_to_read(leaf) for i, leaf in enumerate(saved)}
    return {at: x for at, x in shapes.items() if x.size}


def fill_state(state: TrainState, saved: tuple[Leaf, ...], found: Mapping[str, Any]) -> TrainState:
    """Return the state with the arrays that were read, and its own for the rest."""
    by_name = {leaf.path: found.get(array_number(i)) for i, leaf in enumerate(saved)}
    kinds = dict(saved)
    copied, stacked = copies.paths_of(state), layers.count_stacked_dims(state)

    def fill_leaf(path: str, own: jax.Array) -> jax.Array:
        read = by_name.get(path)
        if read is None:
            return own
        if _compat.is_key_array(own):
            return with_keys(read, own)
        leaf, is_copied = Leaf(path, kinds[path]), path in copied
        there = layers.stacked_as_saved(leaf, own, stacked, copied=is_copied)
        if is_copied and read.shape != there.shape:
            read = copies.share_mean(read, there)
        return layers.stack_here(read, own)

    values = [fill_leaf(path, own) for path, own in _by_name(state).items()]
    return state.replace(**jax.tree.unflatten(jax.tree.structure(state.arrays), values))


def with_keys(numbers: Any, like: Any) -> Any:
    """Return saved numbers as PRNG keys if `like` holds keys, else as they are."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(numbers, impl=_compat.key_impl(like))
    return numbers


def _as_numbers(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if _compat.is_key_array(x) else x


def _by_name(state: TrainState) -> dict[str, jax.Array]:
    return {_path_of(path): x for path, x in jax.tree_util.tree_flatten_with_path(state.arrays)[0]}


def _path_of(path: Any) -> str:
    field, *rest = path
    return f"{field.key}{jax.tree_util.keystr(tuple(rest))}"


def array_number(i: int) -> str:
    """Return the name of array `i` in orbax's files."""
    return f"{i:06d}"
