"""Where the elements of a convolution lie: shapes, flat positions, and the blocks of a program."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax

from txcore.kernels.common import checks

Form = Literal["product", "taps"]


@dataclass(frozen=True)
class Blocks:
    """Hold how much one program of the convolution's kernels computes, and on how many threads.

    Args:
      pixels: pixels of a block, a power of two of at least 16.
      channels: output channels of a block, a power of two of at least 16.
      depth: products that a step adds to each element, a power of two of at least 16. The
        filter's gradient sums over pixels: there `pixels` is this number, and `depth` is the
        number of the block's rows.
      splits: parts of the pixels in the filter's gradient, each summed by a program of its own.
      warps: groups of 32 threads of a program on a GPU.
      stages: steps whose loads are in flight at once on a GPU.
      form: "product" multiplies matrices; "taps" adds up outer products, for few channels.
      windows: pooling windows that a step of the filter's gradient adds, for the form "taps".

    Raises:
      ValueError: a number is one that the kernels cannot run with.

    Example:
      >>> from txcore.kernels.conv.geometry import Blocks
      >>> Blocks(pixels=128).channels
      32
    """

    pixels: int = 64
    channels: int = 32
    depth: int = 32
    splits: int = 32
    warps: int = 4
    stages: int = 2
    form: Form = "product"
    windows: int = 16

    def __post_init__(self) -> None:
        if self.form not in ("product", "taps"):
            raise ValueError(
                f"conv2d: form of Blocks needs to be 'product' or 'taps', got {self.form!r}"
            )
        least = {"pixels": 16, "channels": 16, "depth": 16, "windows": 16}
        for field in fields(self):
            if field.name == "form":
                continue
            value, low = getattr(self, field.name), least.get(field.name, 1)
            power = field.name in least or field.name == "warps"
            if not isinstance(value, int) or value < low or (power and value & (value - 1)):
                kind = "a power of two of" if power else "an integer of"
                raise ValueError(
                    f"conv2d: {field.name} of Blocks needs {kind} at least {low}, got {value!r}"
                )


@dataclass(frozen=True)
class Geometry:
    """Hold the shapes and options of one convolution; the kernels are compiled for them."""

    batch: int
    height: int
    width: int
    channels: int
    rows: int
    columns: int
    features: int
    padding: str
    pool: int
    relu: bool
    dtype: jnp.dtype

    @staticmethod
    def from_shapes(
        x: Any, w: Any, activation: str | None, pool: int | None, padding: str
    ) -> "Geometry":
        """Describe the convolution of images with a filter."""
        batch, height, width, channels = x.shape
        rows, columns, _, features = w.shape
        return Geometry(
            batch=batch,
            height=height,
            width=width,
            channels=channels,
            rows=rows,
            columns=columns,
            features=features,
            padding=padding,
            pool=pool or 1,
            relu=activation == "relu",
            dtype=x.dtype,
        )

    @property
    def padding_before(self) -> tuple[int, int]:
        """How many zeros pad the top and the left."""
        same = self.padding == "SAME"
        return ((self.rows - 1) // 2, (self.columns - 1) // 2) if same else (0, 0)

    @property
    def unpooled_size(self) -> tuple[int, int]:
        """Height and width before pooling."""
        if self.padding == "SAME":
            return self.height, self.width
        return self.height - self.rows + 1, self.width - self.columns + 1

    @property
    def pooled_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        height, width = self.unpooled_size
        return height // self.pool, width // self.pool

    @property
    def window_count(self) -> int:
        """How many pixels the result has."""
        return self.batch * math.prod(self.pooled_size)

    @property
    def depth(self) -> int:
        """How many products are summed for each element before pooling."""
        return self.rows * self.columns * self.channels

    @property
    def accumulator(self) -> jnp.dtype:
        """The dtype of the sums."""
        return checks.accumulator(self.dtype)


def split_index(index: Any, *sizes: int) -> tuple[Any, ...]:
    """Return the coordinates of a flat, non-negative index; the first has no upper bound."""
    coordinates: tuple[Any, ...] = ()
    for size in reversed(sizes):  # not `//`: it also handles negative numbers, which costs time
        coordinates = (lax.rem(index, np.int32(size)), *coordinates)
        index = lax.div(index, np.int32(size))
    return index, *coordinates


def lies_within(row: Any, column: Any, height: int, width: int) -> Any:
    """Tell which pixels lie inside an image of this size."""
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


def ceil_div(size: int, block: int) -> int:
    """Return how many blocks cover a size."""
    return -(-size // block)
