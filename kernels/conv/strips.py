"""How a convolution lies in strips of pooling windows, whose products a TPU computes together."""

from dataclasses import dataclass
from itertools import product

import jax
import jax.numpy as jnp

from txcore.kernels.conv.geometry import Geometry

LANES = 128  # of a TPU's vector registers, and the sides of its matrix unit
SUBLANES = 8


@dataclass(frozen=True)
class Config:
    """Configure implementation="mosaic_tpu" of `conv2d`.

    Args:
      windows: pooling windows beside each other (pixels without a pool) that one product computes;
        of a number that does not divide a row, its largest divisor below does.
      images: in a block. A TPU needs 128, or all of a smaller batch.
    """

    windows: int = 1
    images: int = LANES

    def __post_init__(self) -> None:
        for name, value in (("windows", self.windows), ("images", self.images)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"conv2d: {name} of Config needs an integer of at least 1, got {value!r}"
                )


@dataclass(frozen=True)
class Strips:
    """Hold the strips of one convolution; the kernels are compiled for them.

    One product computes all outputs of a strip's windows from the patch that they read, all
    filters' places in it being the rows of one matrix (`place_filters`).
    """

    geometry: Geometry
    windows: int  # of a strip
    images: int  # of a block

    @staticmethod
    def from_config(geometry: Geometry, config: Config) -> "Strips":
        """Return the strips that a configuration asks for, fitted to the convolution."""
        columns = geometry.pooled_size[1]
        windows = max(n for n in range(1, min(config.windows, columns) + 1) if columns % n == 0)
        return Strips(geometry, windows, min(config.images, geometry.batch))

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of what a strip reads."""
        geometry = self.geometry
        height, width = geometry.pool, geometry.pool * self.windows
        return height + geometry.rows - 1, width + geometry.columns - 1

    @property
    def padded_shape(self) -> tuple[int, int]:
        """Height, and width times channels, of an image with all that strips read around it."""
        geometry = self.geometry
        sizes = zip(
            *((geometry.height, geometry.width), geometry.pooled_size),
            *((geometry.rows, geometry.columns), geometry.padding_before),
            strict=True,
        )
        height, width = (
            max(size + before, pooled * geometry.pool + taps - 1)
            for size, pooled, taps, before in sizes
        )
        return height, width * geometry.channels

    @property
    def features(self) -> int:
        """The filters, with what fills the sublanes of a register."""
        return -(-self.geometry.features // SUBLANES) * SUBLANES

    @property
    def rows(self) -> int:
        """The outputs of a strip, before pooling."""
        return self.geometry.pool**2 * self.windows * self.features

    @property
    def depth(self) -> int:
        """The elements of a patch, with what fills the sublanes of a register."""
        height, width = self.patch_size
        return -(-height * width * self.geometry.channels // SUBLANES) * SUBLANES

    @property
    def flops(self) -> int:
        """The FLOPs of the products for a block of images, those with zeros too."""
        height, width = self.geometry.pooled_size
        return height * (width // self.windows) * 2 * self.rows * self.depth * self.images

    @property
    def product_cost(self) -> float:
        """The rows that pass the tiles of the matrix unit for a window, and those that fill it."""
        tiles = -(-self.depth // LANES)
        return tiles * (self.rows + LANES) / self.windows


def place_filters(w: jax.Array, strips: Strips) -> jax.Array:
    """Return the filters at each of their places in a patch, a matrix (outputs, patch).

    The outputs are in the order (corner of the window, window, feature), the patch's elements
    (row, column, channel).
    """
    geometry = strips.geometry
    height, width = strips.patch_size
    rows, columns, _, features = w.shape
    corners = product(range(geometry.pool), range(geometry.pool), range(strips.windows))
    copies = []
    for i, j, window in corners:
        column = window * geometry.pool + j
        pads = ((i, height - rows - i), (column, width - columns - column), (0, 0))
        copies.append(jnp.pad(w, (*pads, (0, strips.features - features))))
    placed = jnp.stack(copies).reshape(len(copies), -1, strips.features).swapaxes(1, 2)
    placed = placed.reshape(strips.rows, -1)
    return jnp.pad(placed, ((0, 0), (0, strips.depth - placed.shape[1])))
