"""Convolutions in parts: by output channels, then by input channels, with one sum for both."""

from typing import Literal

import jax
import jax.numpy as jnp

from txcore import kernels
from txcore.kernels.conv import pooling
from txcore.parallel.tensor.pair import check_part, enter, leave, split_axes

Activation = Literal["relu"] | None


def column_conv(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    *,
    axis: str,
    activation: Activation = None,
    pool: Literal[2] | None = None,
    padding: Literal["SAME", "VALID"] = "SAME",
    name: str = "column",
) -> jax.Array:
    """Compute this device's output channels of a convolution, by `txcore.kernels.conv2d`.

    Equation: `y[i] = pool(activation(conv(x, w[i]) + b[i]))`, with `w = concatenate(w[0] ...
    w[n-1], 3)`: activation and pooling are of each channel by itself.

    Transpose: the cotangent of `x` is a sum over the devices: a `psum` (of `enter`).

    Args:
      x: images (batch, height, width, in_channels), the same on every device along `axis`.
      w: filters (filter_height, filter_width, in_channels, out_channels / n): this device's.
      b: bias (out_channels / n,).
      axis: the mesh axis over which the layer is split, of n devices.
      activation: as for `conv2d`.
      pool: as for `conv2d`.
      padding: as for `conv2d`.
      name: label of the operations' tags.

    Returns:
      Shape (batch, out_height, out_width, out_channels / n), this device's channels.

    Raises:
      TypeError, ValueError: as `conv2d`; `w` or `b` is the same on every device.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x, w, b):
      ...     return tx.tensor.column_conv(x, w, b, axis="model")
      >>> x, w = np.ones((1, 1, 1, 2), np.float32), np.ones((1, 1, 2, 4), np.float32)
      >>> tx.testing.run_sharded(
      ...     f, x, w, np.arange(4, dtype=np.float32), axes={"model": 2},
      ...     in_specs=(P(), P(None, None, None, "model"), P("model")),
      ...     out_specs=P(None, None, None, "model")).ravel()
      array([2., 3., 4., 5.], dtype=float32)

    References:
      As `column_dense`; Dryden et al., "Channel and filter parallelism for large-scale CNN
      training", 2019.
    """
    axes = split_axes("tensor.column_conv", axis)
    check_part("tensor.column_conv", "w", w, axes, 3)
    check_part("tensor.column_conv", "b", b, axes, 0)
    x = enter(x, axis, name=name)
    return kernels.conv2d(x, w, b, activation=activation, pool=pool, padding=padding)


def row_conv(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    *,
    axis: str,
    activation: Activation = None,
    pool: Literal[2] | None = None,
    padding: Literal["SAME", "VALID"] = "SAME",
    name: str = "row",
) -> jax.Array:
    """Compute a convolution of which each device has some of the input channels.

    Equation: `y = pool(activation(sum_i conv(x[i], w[i]) + b))`, with `w = concatenate(w[0] ...
    w[n-1], 2)`. What is sent is the sum before pooling, since the maximum of a sum is not the sum
    of maxima.

    Transpose: the cotangent goes to every device (of `leave`): nothing is sent.

    Args:
      x: images (batch, height, width, in_channels / n), as `column_conv` returns them.
      w: filters (filter_height, filter_width, in_channels / n, out_channels): this device's.
      b: bias (out_channels,), the same on every device; added once, after the sum.
      axis: the mesh axis over which the layer is split, of n devices.
      activation: as for `txcore.kernels.conv2d`.
      pool: as for `conv2d`.
      padding: as for `conv2d`.
      name: label of the operations' tags.

    Returns:
      Shape (batch, out_height, out_width, out_channels), the same on every device.

    Raises:
      TypeError, ValueError: as `conv2d`; `w` is the same on every device.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x, w, b):
      ...     return tx.tensor.row_conv(x, w, b, axis="model")
      >>> x, w = np.ones((1, 1, 1, 4), np.float32), np.ones((1, 1, 4, 2), np.float32)
      >>> tx.testing.run_sharded(
      ...     f, x, w, np.arange(2, dtype=np.float32), axes={"model": 2}, out_specs=P(),
      ...     in_specs=(P(None, None, None, "model"), P(None, None, "model"), P())).ravel()
      array([4., 5.], dtype=float32)

    References:
      As `column_conv`.
    """
    axes = split_axes("tensor.row_conv", axis)
    if not axes:
        return kernels.conv2d(x, w, b, activation=activation, pool=pool, padding=padding)
    check_part("tensor.row_conv", "w", w, axes, 2)
    part = kernels.conv2d(x, w, jnp.zeros_like(b), padding=padding)
    y = leave(part, axis, name=name) + b
    y = _pool_windows(y) if pool else y
    return jnp.maximum(y, 0) if activation == "relu" else y


def _pool_windows(y: jax.Array) -> jax.Array:
    """Return the maximum of each 2x2 window; its gradient goes to the first of equal ones."""
    windows = pooling.split_windows(y)
    top = pooling.max_of_windows(windows)
    place = pooling.argmax_of_windows(windows, top, None, jnp.dtype(jnp.int8))
    picked = sum(jnp.where(place == k, window, 0) for k, window in enumerate(windows))
    return jnp.where(jnp.isnan(top), top, picked)
