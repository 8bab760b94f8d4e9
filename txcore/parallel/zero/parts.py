"""This device's part of each parameter, and the whole of them again."""

from typing import Any

import jax
from jax import lax

from txcore.collectives import all_gather, axis_index, axis_size
from txcore.layout import Layout, Split, map_alike


def take_part(x: jax.Array, split: Split) -> jax.Array:
    """Return this device's part of an array that is whole."""
    dim, axes = split
    length = x.shape[dim] // axis_size(axes)
    return lax.dynamic_slice_in_dim(x, axis_index(axes) * length, length, dim)


def parts_to_update(params: Any, layouts: Any) -> Any:
    """Return of each parameter what this device has the gradient of, from all that it stores."""

    def take(tree: Any, split: Split) -> Any:
        return jax.tree.map(lambda x: take_part(x, split), tree)

    return map_alike(take, params, layouts, _split_for_update)


def as_stored(params: Any, layouts: Any, *, name: str = "params") -> Any:
    """Return what was updated in parts as it is stored: what is stored whole is gathered."""

    def gather(tree: Any, split: Split) -> Any:
        dim, axes = split
        return all_gather(tree, axes, dim=dim, invariant=True, name=name)

    return map_alike(gather, params, layouts, _split_for_update)


def _split_for_update(layout: Layout) -> Split | None:
    return None if layout.gathered else layout.scattered
