"""What communication keeps from step to step: the leaves of `state.comm_state`.

A plan says which there are (`Plan.kept`). Some are the same on every device; of others each device
has a copy of its own (what its compression has left over, say), which are stored as one array with
a dim more in front.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P


@dataclass(frozen=True)
class Kept:
    """State one leaf of `state.comm_state`: how it lies on the mesh, and how it begins.

    Attributes:
      shape: of the whole array; where there are copies their number is the first dim.
      dtype: jax's name of the dtype.
      spec: how it is stored; where there are copies its first entry is `copies`.
      copies: the axes along which each device has its own, () where that is one device; None where
        there are no copies. A run that goes on with another number of devices gives each of them
        the mean of the copies.
      initial: what it begins as, (shape) -> array; None for zeros.
    """

    shape: tuple[int, ...]
    dtype: str
    spec: P
    copies: tuple[str, ...] | None = None
    initial: Any = None

    def start(self) -> np.ndarray:
        """Return the whole array that a run begins with."""
        if self.initial is not None:
            return np.asarray(self.initial(self.shape), jnp.dtype(self.dtype))
        return np.zeros(self.shape, jnp.dtype(self.dtype))


def start_all(kept: Any) -> Any:
    """Return the arrays that a run begins with, of a pytree of `Kept`."""
    return jax.tree.map(lambda one: one.start(), kept)


def specs_of(kept: Any) -> Any:
    """Return how they are stored, of a pytree of `Kept`."""
    return jax.tree.map(lambda one: one.spec, kept)


def own_copy(x: jax.Array) -> jax.Array:
    """Return this device's copy, without the first dim, of a leaf that has copies."""
    return x[0]


def as_copy(x: jax.Array) -> jax.Array:
    """Return this device's copy as it is stored, with the first dim."""
    return x[None]
