"""How many classes, and how many rows, are looked at at a time."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True)
class ClassBlocks:
    """Configure implementation="xla" of the losses.

    Args:
      classes: how many classes are looked at at a time; as many as there are, or more, for all
        at once. It is evened out, so that no block is much smaller than the others.
    """

    classes: int

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"ClassBlocks: classes must be at least 1; got {self.classes!r}.")


@dataclass(frozen=True)
class LossTiles:
    """Configure implementation="pallas" of the losses.

    Args:
      rows: of the tile of logits that one program computes with, a power of two from 16.
      classes: the tile's columns, a power of two from 16.
      features: how many of a linear layer's features are loaded at once, a power of two from 16.
      block: how many classes' gradients are held at a time behind a linear layer.
      warps: of a GPU's program.
    """

    rows: int
    classes: int
    features: int = 32
    block: int = 4096
    warps: int = 4

    def __post_init__(self) -> None:
        tile = (self.rows, self.classes, self.features)
        if any(size < 16 or size & (size - 1) for size in tile) or min(self.block, self.warps) < 1:
            raise ValueError(
                "LossTiles: rows, classes and features must be powers of two from 16, and block "
                f"and warps at least 1; got {self}."
            )


@dataclass(frozen=True)
class Cut:
    """Cut a dim into blocks of one size: the last is moved back to end where the dim ends."""

    length: int
    size: int  # at most length

    @staticmethod
    def evenly(length: int, size: int) -> "Cut":
        """Cut into as few blocks of at most `size` as there can be, hardly overlapping."""
        count = -(-length // size)
        return Cut(length, -(-length // count))

    @property
    def count(self) -> int:
        """The number of blocks."""
        return -(-self.length // self.size)

    @property
    def fresh(self) -> np.ndarray:
        """How many elements each block has that no earlier block had."""
        return np.minimum(self.size, self.length - np.arange(self.count) * self.size)

    def start(self, block: jax.Array | int) -> jax.Array:
        """Return where a block starts."""
        return lax.min(jnp.int32(block) * self.size, jnp.int32(self.length - self.size))

    def slice(self, x: jax.Array, block: jax.Array | int) -> jax.Array:
        """Return a block of x's last dim."""
        if self.count == 1:
            return x
        return lax.dynamic_slice_in_dim(x, self.start(block), self.size, axis=-1)

    def update(self, x: jax.Array, part: jax.Array, block: jax.Array | int) -> jax.Array:
        """Return x with a block of its last dim replaced."""
        return lax.dynamic_update_slice_in_dim(x, part, self.start(block), axis=-1)

    def is_fresh(self, block: jax.Array | int) -> jax.Array | None:
        """Tell which elements of a block no earlier block had; None where all are fresh."""
        if self.length == self.count * self.size:
            return None
        overlap = jnp.int32(block) * self.size - self.start(block)
        return lax.iota(jnp.int32, self.size) >= overlap
