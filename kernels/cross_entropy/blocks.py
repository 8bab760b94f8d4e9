"""The blocks of classes and rows that the losses are computed by."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True)
class ClassBlocks:
    """Configure implementation="xla" of the losses.

    Args:
      classes: how many classes are read at a time; all of them, or more, for one block. The
        blocks are made even, so that none is much smaller than the others.
    """

    classes: int

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"ClassBlocks: classes needs at least 1, got {self.classes!r}")


@dataclass(frozen=True)
class LossTiles:
    """Configure implementation="pallas" of the losses.

    Args:
      rows: rows of the tile of logits that one program computes, a power of two from 16.
      classes: columns of that tile, a power of two from 16.
      features: how many of a linear layer's features are loaded at once, a power of two from 16.
      block: how many classes have their gradients held at a time, for a linear layer.
      warps: of a program on a GPU.
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
                "LossTiles: rows, classes and features need powers of two from 16, and block and "
                f"warps at least 1, got {self}"
            )


@dataclass(frozen=True)
class Cut:
    """Cut a dim into blocks of one size; the last block is moved back to end with the dim."""

    length: int
    size: int  # at most length

    @staticmethod
    def into_even_blocks(length: int, size: int) -> "Cut":
        """Cut into the fewest blocks of at most `size`, with the least overlap."""
        count = -(-length // size)
        return Cut(length, -(-length // count))

    @property
    def count(self) -> int:
        """The number of blocks."""
        return -(-self.length // self.size)

    @property
    def fresh(self) -> np.ndarray:
        """How many elements of each block are in no earlier block."""
        return np.minimum(self.size, self.length - np.arange(self.count) * self.size)

    def start_of(self, block: jax.Array | int) -> jax.Array:
        """Return where a block starts."""
        return lax.min(jnp.int32(block) * self.size, jnp.int32(self.length - self.size))

    def slice_block(self, x: jax.Array, block: jax.Array | int) -> jax.Array:
        """Return a block of x's last dim."""
        if self.count == 1:
            return x
        return lax.dynamic_slice_in_dim(x, self.start_of(block), self.size, axis=-1)

    def replace_block(self, x: jax.Array, part: jax.Array, block: jax.Array | int) -> jax.Array:
        """Return x with a block of its last dim replaced."""
        return lax.dynamic_update_slice_in_dim(x, part, self.start_of(block), axis=-1)

    def is_fresh(self, block: jax.Array | int) -> jax.Array | None:
        """Tell which elements of a block are in no earlier block; None where all of them are."""
        if self.length == self.count * self.size:
            return None
        overlap = jnp.int32(block) * self.size - self.start_of(block)
        return lax.iota(jnp.int32, self.size) >= overlap
