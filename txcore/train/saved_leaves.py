"""A state's arrays as a checkpoint holds them: numbered in its files, named in its manifest.

They are found again by name: an OrderedDict may have been filled in another order.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from txcore.train.manifest import Leaf
from txcore.train.state import TrainState


def leaves_of(state: TrainState) -> tuple[Leaf, ...]:
    """Return the name and type of every array of a state, in the order in which it is saved."""
    found = jax.tree_util.tree_flatten_with_path(state.arrays)[0]
    seed = int(np.asarray(state.seed))
    return tuple(
        Leaf(_path(path), f"{x.dtype}{list(x.shape)}" + f" {seed}" * (_path(path) == "seed"))
        for path, x in found
    )


def facts(leaves: tuple[Leaf, ...], precision: str) -> tuple[Leaf, ...]:
    """Return what a checkpoint and a state have to have in common.

    Not `loss_scaling`: in float16 it is always there, otherwise it counts what "skip" left out.
    """
    kept = [leaf for leaf in leaves if not leaf.path.startswith("loss_scaling.")]
    return (Leaf("precision", precision), *kept)


def to_save(state: TrainState) -> dict[str, jax.Array]:
    """Return the arrays by their numbers."""
    return {_number(i): x for i, x in enumerate(jax.tree.leaves(state.arrays))}


def to_read(saved: tuple[Leaf, ...], state: TrainState) -> dict[str, jax.ShapeDtypeStruct]:
    """Return which arrays to read, by their numbers, and where on the devices they belong."""
    own = _by_name(state)

    def shape(leaf: Leaf) -> jax.ShapeDtypeStruct:
        if leaf.path in own:
            x = own[leaf.path]
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        # A scalar of `loss_scaling` (see `facts`): read, since orbax reads all, and left out.
        dtype = leaf.kind.removesuffix("[]")
        return jax.ShapeDtypeStruct((), dtype, sharding=state.step.sharding)

    return {_number(i): shape(leaf) for i, leaf in enumerate(saved)}


def filled(state: TrainState, saved: tuple[Leaf, ...], found: Mapping[str, Any]) -> TrainState:
    """Return the state with the arrays that were read; its own ones where there are none."""
    by_name = {leaf.path: found[_number(i)] for i, leaf in enumerate(saved)}
    values = [by_name.get(path, fresh) for path, fresh in _by_name(state).items()]
    return state.replace(**jax.tree.unflatten(jax.tree.structure(state.arrays), values))


def _by_name(state: TrainState) -> dict[str, jax.Array]:
    return {_path(path): x for path, x in jax.tree_util.tree_flatten_with_path(state.arrays)[0]}


def _path(path: Any) -> str:
    field, *rest = path
    return f"{field.key}{jax.tree_util.keystr(tuple(rest))}"


def _number(i: int) -> str:
    return f"{i:06d}"
