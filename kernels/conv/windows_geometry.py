"""The windows into which a pool divides a convolution's output, and the padding for them."""

from dataclasses import dataclass

import jax

from txcore.kernels.conv.geometry import Geometry


@dataclass(frozen=True)
class Windows:
    """Hold the outputs of a convolution as windows of `stride` x `stride`, and its padding."""

    stride: int
    rows: int  # of windows
    columns: int
    height: int  # of the patch that a window reads
    width: int
    top: int  # zeros above the image
    left: int


def windows_of(
    x: jax.Array, w: jax.Array, padding: str, stride: int, partial: bool = False
) -> Windows:
    """Return the windows of a convolution's output.

    Args:
      x: images.
      w: filters.
      padding: "SAME" or "VALID".
      stride: size of a window, 1 or 2.
      partial: whether an odd last row or column makes windows of its own.

    Returns:
      The windows.
    """
    whole = Geometry.from_shapes(x, w, None, None, padding)
    extra = stride - 1 if partial else 0
    rows, columns = ((size + extra) // stride for size in whole.unpooled_size)
    height, width = (size + stride - 1 for size in w.shape[:2])
    return Windows(stride, rows, columns, height, width, *whole.padding_before)
