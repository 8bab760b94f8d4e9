"""A state's arrays as a checkpoint holds them: numbered in its files, named in its manifest.

They are found again by name: an OrderedDict may have been filled in another order. Arrays without
elements are in the manifest alone, and PRNG keys are saved as the numbers that they are made of.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore import _compat
from txcore.train.checkpoints.manifest import CheckpointError, Leaf
from txcore.train.state.state import TrainState


def leaves_of(state: TrainState) -> tuple[Leaf, ...]:
    """Return the name and type of every array of a state, in the order in which it is saved."""
    found = jax.tree_util.tree_flatten_with_path(state.arrays)[0]
    seed = int(np.asarray(state.seed))
    return tuple(
        Leaf(_path(path), kind_of(x) + f" {seed}" * (_path(path) == "seed")) for path, x in found
    )


def kind_of(x: Any) -> str:
    """Return an array's dtype and shape as a manifest holds them: "float32[3, 4]"."""
    return f"{x.dtype}{list(x.shape)}"


def facts(leaves: tuple[Leaf, ...], precision: str) -> tuple[Leaf, ...]:
    """Return what a checkpoint and a state have to have in common.

    Not `loss_scaling`: in float16 it is always there, otherwise it counts what "skip" left out.
    """
    kept = [leaf for leaf in leaves if not leaf.path.startswith("loss_scaling.")]
    return (Leaf("precision", precision), *kept)


def check_kinds(state: TrainState) -> None:
    """Refuse a state with an array that cannot be saved.

    Raises:
      CheckpointError: orbax's storage does not know its dtype.
    """
    import tensorstore  # orbax's own storage

    for name, x in _by_name(state).items():
        dtype = _numbers(x).dtype
        try:
            tensorstore.dtype(dtype.name)
        except (TypeError, ValueError):
            raise CheckpointError(
                f"{name} ({kind_of(x)}) cannot be saved: orbax does not store {dtype.name}. Keep "
                "it in another dtype, or train without checkpoints="
            ) from None


def to_save(state: TrainState) -> dict[str, jax.Array]:
    """Return the arrays by their numbers."""
    arrays = enumerate(jax.tree.leaves(state.arrays))
    return {number(i): _numbers(x) for i, x in arrays if x.size}


def to_read(saved: tuple[Leaf, ...], state: TrainState) -> dict[str, jax.ShapeDtypeStruct]:
    """Return which arrays to read, by their numbers, and where on the devices they belong."""
    own = _by_name(state)

    def shape(leaf: Leaf) -> jax.ShapeDtypeStruct:
        if leaf.path in own:
            x = _numbers(own[leaf.path])
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        # A scalar of `loss_scaling` (see `facts`): read, since orbax reads all, and left out.
        dtype = leaf.kind.removesuffix("[]")
        return jax.ShapeDtypeStruct((), dtype, sharding=state.step.sharding)

    shapes = {number(i): shape(leaf) for i, leaf in enumerate(saved)}
    return {at: x for at, x in shapes.items() if x.size}


def filled(state: TrainState, saved: tuple[Leaf, ...], found: Mapping[str, Any]) -> TrainState:
    """Return the state with the arrays that were read; its own ones where there are none."""
    by_name = {leaf.path: found.get(number(i)) for i, leaf in enumerate(saved)}

    def fill(path: str, own: jax.Array) -> jax.Array:
        read = by_name.get(path)
        if read is None:
            return own
        return with_keys(read, own)

    values = [fill(path, own) for path, own in _by_name(state).items()]
    return state.replace(**jax.tree.unflatten(jax.tree.structure(state.arrays), values))


def with_keys(numbers: Any, like: Any) -> Any:
    """Return saved numbers as the array that they are of: PRNG keys where `like` has them."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(numbers, impl=_compat.key_impl(like))
    return numbers


def _numbers(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if _compat.is_key_array(x) else x


def _by_name(state: TrainState) -> dict[str, jax.Array]:
    return {_path(path): x for path, x in jax.tree_util.tree_flatten_with_path(state.arrays)[0]}


def _path(path: Any) -> str:
    field, *rest = path
    return f"{field.key}{jax.tree_util.keystr(tuple(rest))}"


def number(i: int) -> str:
    """Return the name of array `i` in orbax's files."""
    return f"{i:06d}"
