"""Buckets: which gradients are exchanged together, known before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from txcore.collectives import _leaves
from txcore.layout import Layout, axes_of

_MIB = 1 << 20


@dataclass(frozen=True)
class Buckets:
    """State how large the buckets of gradients are.

    A bucket ends before the leaf that would make it too large; a larger leaf is alone in one.

    Args:
      mb: MiB of one bucket, as it is sent.
      first_mb: MiB of the first bucket, whose exchange begins the sooner the smaller it is.

    Raises:
      TypeError, ValueError: a size is no positive number.

    Example:
      >>> tx.DP("data", buckets=tx.Buckets(mb=10)).buckets
      Buckets(mb=10, first_mb=1)

    References:
      Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020.
    """

    mb: float = 25
    first_mb: float = 1

    def __post_init__(self) -> None:
        for name in ("mb", "first_mb"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, (int, float)) or not size > 0:
                raise ValueError(f"Buckets needs {name}= a number of MiB above 0, got {size!r}")


@dataclass(frozen=True)
class Bucket:
    """Describe the gradients that are exchanged together.

    Attributes:
      leaves: their places in `jax.tree.leaves`, in the order of the bucket.
      names: their paths.
      elements: of each on one device, before the exchange.
      dtype: in which they are summed; float16 is as float32, as by `pmean`.
      axes: the axes over which they are averaged.
      scattered: those of `axes` along which each device keeps its part of the mean alone.
      split: other axes along which they differ, as parts of parameters do.
    """

    leaves: tuple[int, ...]
    names: tuple[str, ...]
    elements: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    scattered: tuple[str, ...] = ()
    split: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of its gradients on one device, as they are summed."""
        return sum(self.elements) * jnp.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        first, *others = self.names
        named = f"{first} ... {others[-1]}" if others else first
        over = ", ".join(self.axes)
        parts = f", in shards over {', '.join(self.scattered)}" if self.scattered else ""
        return (
            f"{self.nbytes / _MIB:.2f} MiB, {self.dtype} over {over}{parts}: "
            f"{len(self.names)} leaves, {named}"
        )


class BucketLayout(tuple[Bucket, ...]):
    """The buckets of a tree in the order of their exchange; its `str` has a line for each."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(f"{i}: {bucket}" for i, bucket in enumerate(self))


def as_buckets(op: str, buckets: Any) -> Buckets | None:
    """Return what `buckets=` stands for: a number is that of MiB.

    Raises:
      TypeError, ValueError: it is something else.
    """
    if buckets is None or isinstance(buckets, Buckets):
        return buckets
    if isinstance(buckets, bool) or not isinstance(buckets, (int, float)):
        raise TypeError(
            f"{op} needs buckets= a number of MiB, tx.Buckets(mb=...) or None, got {buckets!r}"
        )
    if not buckets > 0:
        raise ValueError(
            f"{op} needs buckets= a number of MiB above 0, got {buckets!r}: write None where XLA "
            "is to combine the gradients"
        )
    return Buckets(mb=buckets, first_mb=min(buckets, Buckets.first_mb))


def bucket_layout(tree: Any, layouts: Any, buckets: Buckets) -> BucketLayout:
    """Lay out the gradients of a tree in buckets.

    Those of one bucket have the same dtype and layout. A backward pass computes the gradients of
    the last leaves first, so they come in reverse order.

    Args:
      tree: pytree of gradients of one device, arrays or shapes; what is not floating point is in no
        bucket, nor is what is empty.
      layouts: pytree of `Layout` like it.
      buckets: their sizes.

    Returns:
      The buckets.
    """
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    groups: dict[tuple[Any, ...], list[int]] = {}
    laid = jax.tree.leaves(layouts)
    for i in reversed(range(len(found))):
        leaf, layout = found[i][1], laid[i]
        if layout.reduced and leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating):
            groups.setdefault(_group_of(leaf, layout), []).append(i)
    made = []
    for (dtype, axes, scattered, split), places in groups.items():
        sizes = [found[i][1].size for i in places]
        for chosen in _fill_buckets(sizes, buckets, jnp.dtype(dtype).itemsize):
            leaves = tuple(places[i] for i in chosen)
            names = tuple(_name_leaf(found[i][0]) for i in leaves)
            elements = tuple(sizes[i] for i in chosen)
            made.append(Bucket(leaves, names, elements, dtype, axes, scattered, split))
    return BucketLayout(made)


def whole_before(leaf: Any, layout: Layout, axes: tuple[str, ...]) -> tuple[Any, Layout]:
    """Return the size and layout that a gradient had before it was scattered, if it was.

    A loop over microbatches, and what is gathered for a loss, scatter gradients before the others
    are there. What is left to average of them is in the same buckets as all of it would be.

    Args:
      leaf: a gradient, or a device's part of one.
      layout: with what is left to reduce.
      axes: the data axes.
    """
    done = [a for a in axes_of(layout.gradient) if a in axes and a not in layout.reduced]
    if not done:
        return leaf, layout
    reduced = tuple(a for a in axes if a in layout.reduced or a in done)
    size = leaf.size * _leaves.axes_size(done)
    return jax.ShapeDtypeStruct((size,), leaf.dtype), replace(layout, reduced=reduced)


def _group_of(leaf: Any, layout: Layout) -> tuple[Any, ...]:
    scattered = layout.scattered[1] if layout.scattered is not None else ()
    # A flat array of leaves that are equal along an axis and others that differ would differ.
    split = tuple(axis for axis in layout.norm_axes if axis not in layout.reduced)
    return _leaves.mean_dtype(leaf.dtype).name, layout.reduced, scattered, split


def _fill_buckets(sizes: Sequence[int], buckets: Buckets, itemsize: int) -> list[list[int]]:
    """Return the places of the leaves of each bucket, given their elements in order."""
    filled: list[list[int]] = []
    room = 0.0
    for i, size in enumerate(sizes):
        if not filled or size * itemsize > room:
            room = (buckets.mb if filled else buckets.first_mb) * _MIB
            filled.append([])
        filled[-1].append(i)
        room -= size * itemsize
    return filled


def _name_leaf(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "gradient"
