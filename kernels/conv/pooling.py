"""2x2 pooling in XLA's own ops: the windows as four arrays, and the place of each maximum."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

NO_PLACE = 4  # the place in a window that passes no gradient, because ReLU stops it


def split_windows(y: jax.Array) -> list[jax.Array]:
    """Return the four elements of every 2x2 window, row by row, without an odd row or column."""
    height, width = y.shape[1] // 2 * 2, y.shape[2] // 2 * 2
    return [y[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]


def join_windows(windows: Sequence[jax.Array], height: int, width: int) -> jax.Array:
    """Undo `split_windows`, and cut the result to this height and width."""
    rows = [jnp.stack(windows[:2], axis=3), jnp.stack(windows[2:], axis=3)]
    y = jnp.stack(rows, axis=2)
    y = y.reshape(y.shape[0], 2 * y.shape[1], 2 * y.shape[3], y.shape[5])
    return y[:, :height, :width]


def max_of_windows(windows: Sequence[jax.Array]) -> jax.Array:
    """Return the maximum of every window."""
    return jnp.maximum(jnp.maximum(*windows[:2]), jnp.maximum(*windows[2:]))


def argmax_of_windows(
    windows: Sequence[jax.Array], top: jax.Array, passed: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """Return which element of every window is its maximum: the first of equal ones.

    Args:
      windows: the four elements.
      top: their maximum.
      passed: where ReLU passes the maximum; None for everywhere.
      dtype: of the result.

    Returns:
      0 to 3, or NO_PLACE where nothing passed.
    """
    # The last place needs no comparison: a window of NaNs, equal to nothing, has it.
    place = jnp.full_like(top, 3, dtype)
    for k in (2, 1, 0):
        place = jnp.where(windows[k] == top, jnp.full_like(place, k), place)
    return place if passed is None else jnp.where(passed, place, jnp.full_like(place, NO_PLACE))


def scatter_to_corners(place: jax.Array, g: jax.Array) -> list[jax.Array]:
    """Return four arrays with each window's gradient in the one of its place, zero elsewhere."""
    return [jnp.where(place == k, g, 0) for k in range(4)]


def scatter_to_image(place: jax.Array, g: jax.Array, height: int, width: int) -> jax.Array:
    """Return an array of this height and width with each window's gradient at its place."""
    at = jnp.arange(4, dtype=place.dtype).reshape(1, 1, 2, 1, 2, 1)
    y = jnp.where(place[:, :, None, :, None] == at, g[:, :, None, :, None], 0)
    y = y.reshape(g.shape[0], 2 * g.shape[1], 2 * g.shape[2], g.shape[3])
    return jnp.pad(y, ((0, 0), (0, height - y.shape[1]), (0, width - y.shape[2]), (0, 0)))
