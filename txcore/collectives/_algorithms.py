"""The algorithms of a collective beside XLA's own: which there are, and what they need."""

from typing import Any, Literal, get_args

from txcore import _compat
from txcore.collectives import _leaves
from txcore.collectives._leaves import Leaf
from txcore.kernels.ring.call import DTYPES

Algorithm = Literal["remote_dma"]


def check_algorithm(op: str, algorithm: Any) -> None:
    """Refuse what is no algorithm.

    Raises:
      ValueError: with those that there are.
    """
    if algorithm is not None and algorithm not in get_args(Algorithm):
        names = ", ".join(map(repr, get_args(Algorithm)))
        raise ValueError(f"tx.{op} needs algorithm= {names} or None, got {algorithm!r}")


def check_ring_leaf(op: str, leaf: Leaf, axes: tuple[str, ...]) -> str:
    """Return the axis of the ring for a leaf; refuse what no ring of remote DMA can carry.

    Args:
      op: the collective.
      leaf: one array of its tree.
      axes: the mesh axes of more than one device, at least one.

    Raises:
      ValueError: there are several axes, or the leaf is unreduced.
      TypeError: the leaf's dtype is none that the kernels have.
    """
    if len(axes) > 1:
        raise ValueError(
            f"tx.{op} needs one mesh axis, a ring, with algorithm='remote_dma', got {axes}: call "
            "it once for each axis, or leave algorithm= out"
        )
    if leaf.value.dtype.name not in DTYPES:
        raise TypeError(
            f"tx.{op} needs arrays of {', '.join(DTYPES)} with algorithm='remote_dma', got "
            f"{leaf.value.dtype.name} at {leaf.where}: cast it, or leave algorithm= out"
        )
    (axis,) = axes
    if axis in _compat.unreduced_axes(leaf.value):
        _leaves.refuse_unreduced(f"{op}(algorithm='remote_dma')", leaf, axes)
    return axis
