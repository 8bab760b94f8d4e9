"""Translate between mesh axes and groups of devices."""

import functools
import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from txcore.profiling.hlo import Groups, groups_of_block, sort_groups

Sizes = tuple[tuple[str, int], ...]  # the axes of a mesh and their sizes, in the mesh's order


class MeshLike(Protocol):
    """A jax Mesh or AbstractMesh, used only for the sizes of its axes."""

    @property
    def shape(self) -> Mapping[str, int]:
        """Return the size of each axis."""


def sizes_of(mesh: MeshLike) -> Sizes:
    """Return the axes of a mesh and their sizes, in order."""
    return tuple((str(name), int(size)) for name, size in mesh.shape.items())


def count_devices(sizes: Sizes, axes: tuple[str, ...]) -> int:
    """Return how many devices a group along `axes` has."""
    return math.prod(size for name, size in sizes if name in axes)


@functools.lru_cache(maxsize=4096)
def device_groups(
    sizes: Sizes, axes: tuple[str, ...], index_groups: tuple[tuple[int, ...], ...] | None = None
) -> Groups:
    """Return the groups of devices of a collective along `axes`, by place in the mesh.

    Args:
      sizes: the mesh.
      axes: axis names; the order in which they are named orders the members.
      index_groups: positions along `axes` that form a group each, as lax's axis_index_groups.

    Returns:
      The groups, sorted.

    Example:
      >>> list(device_groups((("data", 2), ("model", 2)), ("data",)))
      [(0, 2), (1, 3)]
    """
    if index_groups is None:
        return groups_of_block((size, name in axes) for name, size in sizes)
    names = [name for name, _ in sizes]
    chosen = [names.index(axis) for axis in axes]
    kept = [i for i in range(len(names)) if i not in chosen]
    ids = np.arange(math.prod(size for _, size in sizes)).reshape([size for _, size in sizes])
    rows = ids.transpose(kept + chosen).reshape(-1, count_devices(sizes, axes))
    return sort_groups(row[list(group)].tolist() for row in rows for group in index_groups)


@functools.lru_cache(maxsize=4096)
def device_pairs(
    sizes: Sizes, axes: tuple[str, ...], perm: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...]:
    """Return the (source, target) devices of a permute along `axes`, sorted."""
    names = [name for name, _ in sizes]
    chosen = [names.index(axis) for axis in axes]
    kept = [i for i in range(len(names)) if i not in chosen]
    ids = np.arange(math.prod(size for _, size in sizes)).reshape([size for _, size in sizes])
    rows = ids.transpose(kept + chosen).reshape(-1, count_devices(sizes, axes))
    return tuple(sorted((int(row[a]), int(row[b])) for row in rows for a, b in perm))


def axes_of_groups(groups: Groups, sizes: Sizes) -> tuple[str, ...] | None:
    """Return the mesh axes that form these groups, or None where no axes do.

    Axes of size 1 are left out: groups do not depend on them.
    """
    if not groups or groups.devices != math.prod(size for _, size in sizes):
        return None
    # Device 0 shares its group with its neighbour along each of the axes: at most one set of axes
    # can form the groups, and it is compared as a whole.
    stride, found = 1, []
    for name, size in reversed(sizes):
        if size > 1 and groups.first_holds(stride):
            found.append(name)
        stride *= size
    axes = tuple(reversed(found))
    return axes if device_groups(sizes, axes) == groups else None


def axes_of_pairs(pairs: tuple[tuple[int, int], ...], sizes: Sizes) -> tuple[str, ...] | None:
    """Return the mesh axes along which a permute moves data; None for devices out of the mesh."""
    total = math.prod(size for _, size in sizes)
    if any(device >= total for pair in pairs for device in pair):
        return None
    shape = [size for _, size in sizes]
    ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    moved = [
        bool((source != target).any())
        for source, target in zip(
            np.unravel_index(ends[:, 0], shape), np.unravel_index(ends[:, 1], shape), strict=True
        )
    ]
    return tuple(name for (name, _), moves in zip(sizes, moved, strict=True) if moves)
