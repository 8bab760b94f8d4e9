"""The convolution by 3x3 filters, by Winograd's F(2x2, 3x3): 16 products for 4 outputs, not 36.

The output is cut into tiles of 2x2, which are also the windows of a 2x2 pool. Each of the 16
coefficients of a tile is an array of its own, [tiles, channels], with one matrix product for
each: nothing is stacked. A value that is not finite spreads over the tiles that read it.

Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from txcore.kernels.conv.windows_geometry import Windows

Arrays = Sequence[jax.Array]

_FILTER = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])  # of 3 taps


def transform_filters(w: jax.Array) -> jax.Array:
    """Return the filters' coefficients, [16, in_channels, out_channels]."""
    g = jnp.asarray(_FILTER, w.dtype)
    u = jnp.einsum("ai,bj,ijco->abco", g, g, w, precision="highest")
    return u.reshape(16, *w.shape[2:])


def forward(x: jax.Array, u: jax.Array, at: Windows) -> list[jax.Array]:
    """Return the 4 outputs of every tile, row by row, from what `transform_filters` returned."""
    products = [a @ b for a, b in zip(_input_coefficients(x, at), u, strict=True)]
    by_row = [_combine_products(products[i : i + 4]) for i in range(0, 16, 4)]
    left, right = (_combine_products([row[side] for row in by_row]) for side in (0, 1))
    shape = (x.shape[0], at.rows, at.columns, u.shape[2])
    return [y.reshape(shape) for y in (left[0], right[0], left[1], right[1])]


def backward(x: jax.Array, u: jax.Array, dy: Arrays, at: Windows) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of x and of the filters' coefficients.

    Args:
      x: the images.
      u: what `transform_filters` returned.
      dy: gradients of the 4 outputs of every tile, each [batch, rows, columns, channels].
      at: the tiles.
    """
    left, right = _spread_gradients(dy[0], dy[2]), _spread_gradients(dy[1], dy[3])
    by_row = [_spread_gradients(a, b) for a, b in zip(left, right, strict=True)]
    d = [coefficient.reshape(-1, u.shape[2]) for row in by_row for coefficient in row]
    du = jnp.stack([v.T @ m for v, m in zip(_input_coefficients(x, at), d, strict=True)])
    shape = (x.shape[0], at.rows, at.columns, x.shape[3])
    dv = [(m @ k.T).reshape(shape) for m, k in zip(d, u, strict=True)]
    return _input_gradient(dv, x, at), du


def _input_coefficients(x: jax.Array, at: Windows) -> list[jax.Array]:
    """Return the 16 coefficients of every tile of x, each [tiles, channels]."""
    x = lax.pad(x, jnp.zeros((), x.dtype), _tile_padding(x, at))
    by_row = _transform_tiles(x, 1, at.rows)
    parts = [part for row in by_row for part in _transform_tiles(row, 2, at.columns)]
    return [part.reshape(-1, x.shape[3]) for part in parts]


def _tile_padding(x: jax.Array, at: Windows) -> list[tuple[int, int, int]]:
    below, right = 2 * at.rows + 2 - at.top - x.shape[1], 2 * at.columns + 2 - at.left - x.shape[2]
    return [(0, 0, 0), (at.top, below, 0), (at.left, right, 0), (0, 0, 0)]


def _transform_tiles(x: jax.Array, dim: int, tiles: int) -> list[jax.Array]:
    d = [lax.slice_in_dim(x, k, k + 2 * tiles - 1, stride=2, axis=dim) for k in range(4)]
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _combine_products(m: Arrays) -> tuple[jax.Array, jax.Array]:
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _spread_gradients(first: jax.Array, second: jax.Array) -> list[jax.Array]:
    """Apply the transpose of `_combine`."""
    return [first, first + second, first - second, -second]


def _input_gradient(dv: Arrays, x: jax.Array, at: Windows) -> jax.Array:
    """Apply the transpose of `_input_coefficients`, to [batch, rows, columns, channels] each."""
    by_row = [_add_overlaps(dv[i : i + 4], 2) for i in range(0, 16, 4)]
    by_column = [_add_overlaps([row[parity] for row in by_row], 1) for parity in (0, 1)]
    rows = [jnp.stack([by_column[0][p], by_column[1][p]], axis=3) for p in (0, 1)]
    full = jnp.stack(rows, axis=2)
    batch, height, _, width, _, channels = full.shape
    full = full.reshape(batch, 2 * height, 2 * width, channels)
    crop = [(-low, -high, 0) for low, high, _ in _tile_padding(x, at)]
    return lax.pad(full, jnp.zeros((), x.dtype), crop)


def _add_overlaps(d: Arrays, dim: int) -> tuple[jax.Array, jax.Array]:
    """Add up what neighbouring tiles contribute to the even and to the odd places along `dim`."""

    def shift_by(a: jax.Array, by: int) -> jax.Array:
        widths = [(by, 1 - by, 0) if i == dim else (0, 0, 0) for i in range(a.ndim)]
        return lax.pad(a, jnp.zeros((), a.dtype), widths)

    even = shift_by(d[0], 0) + shift_by(d[1] + d[2] - d[0], 1)
    return even, shift_by(d[1] - d[2] + d[3], 0) - shift_by(d[3], 1)
