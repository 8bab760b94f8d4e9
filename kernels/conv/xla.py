"""The convolution in XLA's own ops, with a VJP that spares what autodiff would recompute."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from txcore.kernels import checks

Residuals = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


def conv2d(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    *,
    config: None,
    activation: str | None,
    pool: int | None,
    padding: str,
) -> jax.Array:
    """Compute the op of `txcore.kernels.conv2d` on checked operands."""
    return _conv2d(x, w, b, activation, pool, padding)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _conv2d(
    x: jax.Array, w: jax.Array, b: jax.Array, activation: str | None, pool: int | None, padding: str
) -> jax.Array:
    return _forward(x, w, b, activation, pool, padding)[0]


def _forward(
    x: jax.Array, w: jax.Array, b: jax.Array, activation: str | None, pool: int | None, padding: str
) -> tuple[jax.Array, Residuals]:
    y = _convolve(x, w, padding)
    # The maximum of y + b is (the maximum of y) + b, also when rounded: a quarter of the work.
    out = (_maximum(_corners(y)) if pool else y) + b.astype(y.dtype)
    if activation == "relu":
        out = jnp.maximum(out, 0)
    out = out.astype(x.dtype)
    saved_y = y.astype(x.dtype) if pool else None
    return out, (x, w, saved_y, out if activation == "relu" else None)


def _backward(
    activation: str | None, pool: int | None, padding: str, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, w, y, out = residuals
    if out is not None:
        g = jnp.where(out > 0, g, 0)
    db = jnp.sum(g, (0, 1, 2), dtype=checks.accumulator(g.dtype)).astype(g.dtype)
    dy = g if y is None else _unpool(y, g)
    _, transpose = jax.vjp(lambda x, w: _lax_conv(x, w, padding), x, w)
    dx, dw = transpose(dy)
    return dx, dw, db


_conv2d.defvjp(_forward, _backward)


def _lax_conv(
    x: jax.Array, w: jax.Array, padding: str, out_dtype: jnp.dtype | None = None
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        w,
        window_strides=(1, 1),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=out_dtype,
    )


def _convolve(x: jax.Array, w: jax.Array, padding: str) -> jax.Array:
    dtype = checks.accumulator(x.dtype)
    if x.shape[3] > 1:
        return _lax_conv(x, w, padding, dtype)
    # With one input channel shifted slices and one dot are faster on CPU than XLA's convolution
    # (step of a 3x3 filter at batch 64: 1.5x, 5x5: 1.05x to 1.2x, at batch 256 even). The
    # filter's gradient is not, so that stays XLA's.
    patches = _patches(x, w.shape[0], w.shape[1], padding)
    return jnp.matmul(patches, w.reshape(-1, w.shape[3]), preferred_element_type=dtype)


def _patches(x: jax.Array, rows: int, columns: int, padding: str) -> jax.Array:
    if padding == "SAME":
        before = ((rows - 1) // 2, (columns - 1) // 2)
        x = jnp.pad(x, ((0, 0), (before[0], rows // 2), (before[1], columns // 2), (0, 0)))
    height, width = x.shape[1] - rows + 1, x.shape[2] - columns + 1
    shifted = [x[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    return jnp.concatenate(shifted, axis=3)


def _corners(y: jax.Array) -> list[jax.Array]:
    """Return the four elements of every 2x2 window, row by row."""
    height, width = y.shape[1] // 2 * 2, y.shape[2] // 2 * 2
    return [y[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]


def _maximum(corners: list[jax.Array]) -> jax.Array:
    return jnp.maximum(jnp.maximum(*corners[:2]), jnp.maximum(*corners[2:]))


def _unpool(y: jax.Array, g: jax.Array) -> jax.Array:
    """Give each window's gradient to the first of its elements that is the maximum."""
    corners = _corners(y)
    top = _maximum(corners)
    parts = []
    for corner in corners[:3]:
        hit = corner == top
        parts.append(jnp.where(hit, g, 0))
        g = jnp.where(hit, 0, g)
    parts.append(g)  # what no other claimed, so that nothing is lost in a window of NaNs either
    rows = [jnp.stack(parts[:2], axis=3), jnp.stack(parts[2:], axis=3)]
    batch, height, width, channels = g.shape
    dy = jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)
    return jnp.pad(dy, [(0, full - part) for full, part in zip(y.shape, dy.shape, strict=True)])
