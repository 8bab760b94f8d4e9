"""Where the outputs of a convolution lie, and the windows that a pool makes of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Hold the outputs of a convolution as windows of `stride` x `stride`, and its padding."""

    stride: int
    rows: int  # of windows
    columns: int
    top: int  # zeros above the image
    left: int


def geometry_of(
    image: tuple[int, int], filter_size: tuple[int, int], padding: str, stride: int, partial: bool
) -> Geometry:
    """Return the windows of a convolution's output.

    Args:
      image: height and width.
      filter_size: height and width.
      padding: "SAME" or "VALID".
      stride: size of a window, 1 or 2.
      partial: whether an odd last row or column has windows of its own.

    Returns:
      The geometry.
    """
    lost = [size - 1 for size in filter_size]
    sizes = image if padding == "SAME" else [n - k for n, k in zip(image, lost, strict=True)]
    rows, columns = ((n + (stride - 1) * partial) // stride for n in sizes)
    top, left = (k // 2 if padding == "SAME" else 0 for k in lost)
    return Geometry(stride, rows, columns, top, left)
