"""Layouts: how each leaf of a state lies on the mesh, and how its gradient arrives.

The plan makes one for each parameter (`Plan.layouts`). Whoever places, checks, reduces, measures
or saves a leaf asks it, and takes nothing for the same on every device.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

# A dim that is split, and the axes of the mesh that split it.
Split = tuple[int, tuple[str, ...]]


@dataclass(frozen=True)
class Layout:
    """State how one parameter lies on the mesh. Axes of one device are named nowhere.

    Attributes:
      stored: how the parameter itself is stored.
      gradient: how its gradient arrives at the optimizer; moments and whatever else mirrors the
        parameter are stored so too.
      reduced: the axes over which its gradient is averaged. Where `gradient` names one of them,
        each device keeps its part of the mean alone (a reduce-scatter), elsewhere all of it.

    Example:
      >>> from txcore.layout import Layout
      >>> Layout(P(None, "model"), P(None, "model"), ("data",)).norm_axes
      ('model',)
    """

    stored: P
    gradient: P
    reduced: tuple[str, ...]

    @property
    def stored_axes(self) -> tuple[str, ...]:
        """The axes over which the parameter is split."""
        return axes_of(self.stored)

    @property
    def norm_axes(self) -> tuple[str, ...]:
        """The axes over which its gradient is split, sorted: its squared norm sums over them."""
        return tuple(sorted(axes_of(self.gradient)))

    @property
    def scattered(self) -> Split | None:
        """The dim of which each device keeps its part of the mean, with the axes; None for none."""
        return _split_over(self.gradient, self.reduced)

    @property
    def gathered(self) -> Split | None:
        """The same of the parameter itself: a step gathers it before it computes with it."""
        return _split_over(self.stored, self.reduced)

    @property
    def view(self) -> P:
        """How the parameter lies where a step computes with it: whole along the data axes."""
        return drop_axes(self.stored, frozenset(self.reduced))


def _split_over(spec: P, axes: tuple[str, ...]) -> Split | None:
    for dim, entry in enumerate(spec):
        if own := tuple(axis for axis in entry_axes(entry) if axis in axes):
            return dim, own
    return None


def shape_of_part(shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a device's part of an array.

    Args:
      shape: of the whole array.
      spec: how it lies on the mesh.
      sizes: the devices along each axis of the mesh.
    """
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    devices = [math.prod(sizes[axis] for axis in entry_axes(entry)) for entry in entries]
    return tuple(size // own for size, own in zip(shape, devices, strict=True))


def entry_axes(entry: Any) -> tuple[str, ...]:
    """Return the axes that one entry of a PartitionSpec names: None, a name, or a tuple."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def axes_of(spec: P) -> tuple[str, ...]:
    """Return all axes that a PartitionSpec names, in its order."""
    return tuple(axis for entry in spec for axis in entry_axes(entry))


def drop_axes(spec: P, axes: frozenset[str]) -> P:
    """Return a spec without some axes, of as many entries."""

    def kept(entry: Any) -> Any:
        rest = tuple(a for a in entry_axes(entry) if a not in axes)
        return rest[0] if len(rest) == 1 else rest or None

    return P(*map(kept, spec))


def gradient_specs(layouts: Any) -> Any:
    """Return how the gradients of a tree of layouts arrive."""
    return jax.tree.map(lambda layout: layout.gradient, layouts)


def split_axes(layouts: Any) -> tuple[str, ...]:
    """Return the axes over which the gradient of any leaf is split, each once, sorted."""
    return tuple(sorted({axis for one in jax.tree.leaves(layouts) for axis in one.norm_axes}))


def same_structure(tree: Any, other: Any) -> bool:
    """Tell whether two pytrees have the same structure."""
    ours: Any = jax.tree.structure(tree)
    return ours == jax.tree.structure(other)


def map_alike(
    function: Callable[[Any, Any], Any], tree: Any, layouts: Any, key_of: Callable[[Layout], Any]
) -> Any:
    """Apply `function(tree, key)` once to all leaves that are laid out alike.

    Args:
      function: gets the tree with None for the leaves of other keys, and keeps its structure. It
        is not called where the key is None or empty: those leaves stay as they are.
      tree: pytree with the structure of `layouts`.
      layouts: pytree of `Layout`.
      key_of: what of a layout counts: its axes, or the dim that they split.

    Returns:
      The tree.
    """
    treedef: Any = jax.tree.structure(layouts)
    leaves = treedef.flatten_up_to(tree)
    keys = [key_of(layout) for layout in jax.tree.leaves(layouts)]
    for key in dict.fromkeys(keys):
        if not key:
            continue
        chosen = [leaf if own == key else None for leaf, own in zip(leaves, keys, strict=True)]
        done = treedef.flatten_up_to(function(treedef.unflatten(chosen), key))
        leaves = [d if own == key else x for d, x, own in zip(done, leaves, keys, strict=True)]
    return treedef.unflatten(leaves)


def mirrored_specs(what: str, tree: Any, params: Any, layouts: Any) -> Any:
    """Return the spec of each leaf of a tree that is made of the parameters, as an optimizer's is.

    A subtree with the structure and shapes of the parameters lies as their gradients do; so does
    a leaf whose path ends in that of a parameter of its shape (where `optax.masked` leaves the
    others out). What else there is (counts, rates) is whole on every device.

    Args:
      what: what errors call the tree.
      tree: pytree of arrays or shapes.
      params: the parameters, or their shapes.
      layouts: pytree of `Layout` like them.

    Returns:
      A pytree of PartitionSpecs with the structure of `tree`.

    Raises:
      ValueError: a leaf belongs to a parameter that is split, and has another shape.
    """
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    known = {
        path: (np.shape(leaf), layout)
        for (path, leaf), layout in zip(found, jax.tree.leaves(layouts), strict=True)
    }
    shapes = [np.shape(leaf) for _, leaf in found]
    specs = jax.tree.map(lambda layout: layout.gradient, layouts)

    def is_mirror(node: Any) -> bool:
        return (
            same_structure(node, params)
            and [np.shape(leaf) for leaf in jax.tree.leaves(node)] == shapes
        )

    def specs_of(path: Any, node: Any) -> Any:
        return specs if is_mirror(node) else _spec_by_path(what, path, node, known)

    return jax.tree_util.tree_map_with_path(specs_of, tree, is_leaf=is_mirror)


def _spec_by_path(what: str, path: Any, leaf: Any, known: Mapping[Any, Any]) -> P:
    tails = (path[i:] for i in range(1, len(path)))
    tail = next((tail for tail in tails if tail in known), None)
    shape = np.shape(leaf)
    if tail is None or not shape:
        return P()
    of_param, layout = known[tail]
    if shape == of_param:
        return layout.gradient
    if layout.norm_axes:
        name = jax.tree_util.keystr(tail)
        raise ValueError(
            f"{what}{jax.tree_util.keystr(path)} has shape {shape}, but params{name}, whose "
            f"gradient is split over {', '.join(map(repr, layout.norm_axes))}, has {of_param}: "
            "each device would need another part of it than it has. Use an optimizer that is "
            f"elementwise (tx.optim.adamw), or store params{name} whole"
        )
    return P()
