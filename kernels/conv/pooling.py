"""2x2 pooling in XLA's own ops: windows as four arrays, and where each one's maximum is."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

NO_PLACE = 4  # the place of a window that passes no gradient, since ReLU stopped it


def corners(y: jax.Array) -> list[jax.Array]:
    """Return the four elements of every 2x2 window, row by row, without odd ends."""
    height, width = y.shape[1] // 2 * 2, y.shape[2] // 2 * 2
    return [y[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]


def interleave(windows: Sequence[jax.Array], height: int, width: int) -> jax.Array:
    """Undo `corners`, and cut the result to a height and width."""
    rows = [jnp.stack(windows[:2], axis=3), jnp.stack(windows[2:], axis=3)]
    y = jnp.stack(rows, axis=2)
    y = y.reshape(y.shape[0], 2 * y.shape[1], 2 * y.shape[3], y.shape[5])
    return y[:, :height, :width]


def maximum(windows: Sequence[jax.Array]) -> jax.Array:
    """Return the maximum of every window."""
    return jnp.maximum(jnp.maximum(*windows[:2]), jnp.maximum(*windows[2:]))


def places(
    windows: Sequence[jax.Array], top: jax.Array, passed: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """Return which element of every window is its maximum, the first of several.

    Args:
      windows: the four elements.
      top: their maximum.
      passed: where ReLU passes it; None for everywhere.
      dtype: of the result.

    Returns:
      0 to 3, or NO_PLACE where nothing passed.
    """
    # The last one without a comparison, so that a window of NaNs has a place and nothing is lost.
    place = jnp.full_like(top, 3, dtype)
    for k in (2, 1, 0):
        place = jnp.where(windows[k] == top, jnp.full_like(place, k), place)
    return place if passed is None else jnp.where(passed, place, jnp.full_like(place, NO_PLACE))


def apart(place: jax.Array, g: jax.Array) -> list[jax.Array]:
    """Give each window's gradient to its place among four arrays."""
    return [jnp.where(place == k, g, 0) for k in range(4)]


def unpool(place: jax.Array, g: jax.Array, height: int, width: int) -> jax.Array:
    """Give each window's gradient to its place in an array of that height and width."""
    at = jnp.arange(4, dtype=place.dtype).reshape(1, 1, 2, 1, 2, 1)
    y = jnp.where(place[:, :, None, :, None] == at, g[:, :, None, :, None], 0)
    y = y.reshape(g.shape[0], 2 * g.shape[1], 2 * g.shape[2], g.shape[3])
    return jnp.pad(y, ((0, 0), (0, height - y.shape[1]), (0, width - y.shape[2]), (0, 0)))
