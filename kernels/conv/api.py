"""The public convolution: what it takes and what it refuses."""

from typing import Literal

import jax
from jax.typing import ArrayLike

from txcore import varying
from txcore.kernels.common import checks
from txcore.kernels.conv import jax_triton_conv, mosaic, pallas, xla
from txcore.kernels.dispatch import registry

Activation = Literal["relu"] | None
Padding = Literal["SAME", "VALID"]

KERNELS: registry.Kernels = {
    "xla": registry.Kernel(xla.conv2d, xla.list_configs),
    "pallas_triton": registry.Kernel(pallas.conv2d, pallas.list_configs, pallas.explain_refusal),
    "mosaic_tpu": registry.Kernel(mosaic.conv2d, mosaic.list_configs, mosaic.explain_refusal),
    "jax_triton": registry.Kernel(
        jax_triton_conv.conv2d, jax_triton_conv.list_configs, jax_triton_conv.explain_refusal
    ),
}


def conv2d(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike,
    *,
    activation: Activation = None,
    pool: Literal[2] | None = None,
    padding: Padding = "SAME",
    implementation: registry.Implementation | None = None,
    config: xla.Config | pallas.Blocks | mosaic.Config | None = None,
) -> jax.Array:
    """Convolve images by a filter with stride 1, add a bias, activate and pool, in this order.

    Half-precision operands are accumulated in float32 and the result is rounded once. A maximum
    that occurs more than once in a pooling window passes its gradient to its first occurrence
    (row by row), as the gradient of `lax.reduce_window` does.

    Reverse-mode differentiation only: the op has its own VJP, so `jax.jvp`, `jax.jacfwd` and
    `jax.hessian` raise jax's error about forward-mode on a custom_vjp function.

    Args:
      x: images, shape (batch, height, width, in_channels), any floating dtype.
      w: filters, shape (filter_height, filter_width, in_channels, out_channels), x's dtype.
      b: bias, shape (out_channels,), x's dtype.
      activation: None or "relu".
      pool: None, or 2 for the maximum over 2x2 windows with stride 2; an odd last row or
        column is left out.
      padding: "SAME" pads with zeros to keep height and width, "VALID" does not pad.
      implementation: None for the fastest known, or a back end by name: "xla", or "pallas" for the
        platform's Pallas kernel (`txcore.kernels.dispatch.back_ends` lists all).
      config: how the named implementation computes it, `kernels.conv.xla.Config`,
        `kernels.conv.geometry.Blocks` or `kernels.conv.strips.Config`; None for the fastest known.
        The forms "winograd" and "windows" (the first choices on CPU) round differently from XLA's
        convolution, as accurately, and spread a value that is not finite over the whole window
        that reads it; "mosaic_tpu" spreads it over the strip of windows that reads it.

    Returns:
      Shape (batch, out_height, out_width, out_channels), x's dtype, where the height and width
      are halved (rounded down) by `pool`.

    Raises:
      TypeError: an operand is not floating-point, or the dtypes differ.
      ValueError: a shape or an option does not fit.
      NotImplementedError: there is no such implementation of this op.

    Example:
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> image, filters = jnp.ones((8, 28, 28, 1)), jnp.ones((5, 5, 1, 32))
      >>> kernels.conv2d(image, filters, jnp.zeros(32), activation="relu", pool=2).shape
      (8, 14, 14, 32)
    """
    x, w, b = checks.require_floats("conv2d", x=x, w=w, b=b)
    checks.require_same_dtype("conv2d", x=x, w=w, b=b)
    checks.require_one_of("conv2d", "activation", activation, (None, "relu"))
    checks.require_one_of("conv2d", "pool", pool, (None, 2))
    checks.require_one_of("conv2d", "padding", padding, ("SAME", "VALID"))
    _check_shapes(x, w, b)
    _check_size(x, w, pool, padding)
    return registry.run_op(
        "conv2d",
        KERNELS,
        *varying.match_varying(x, w, b),
        implementation=implementation,
        config=config,
        activation=activation,
        pool=pool,
        padding=padding,
    )


def _check_shapes(x: jax.Array, w: jax.Array, b: jax.Array) -> None:
    given = f"got x {x.shape}, w {w.shape}, b {b.shape}"
    if x.ndim != 4 or w.ndim != 4 or b.ndim != 1:
        raise ValueError(
            "conv2d: x needs the dims (batch, height, width, in_channels), w (filter_height, "
            f"filter_width, in_channels, out_channels) and b (out_channels,), {given}: add a "
            "batch dim to a single image, or use jax.vmap for more batch dims"
        )
    if x.shape[3] != w.shape[2]:
        raise ValueError(
            f"conv2d: x and w need the same in_channels (x's last dim, w's dim 2), {given}: "
            "transpose x to NHWC and w to HWIO"
        )
    if w.shape[3] != b.shape[0]:
        raise ValueError(
            f"conv2d: b needs w's out_channels (w's last dim), {given}: pass one bias for each of "
            "w's filters"
        )


def _check_size(x: jax.Array, w: jax.Array, pool: int | None, padding: str) -> None:
    lost = (0, 0) if padding == "SAME" else (w.shape[0] - 1, w.shape[1] - 1)
    height, width = x.shape[1] - lost[0], x.shape[2] - lost[1]
    least = pool or 1
    if min(height, width) < least or 0 in w.shape:
        raise ValueError(
            f"conv2d: pool={pool} needs an output of at least {least}x{least} before pooling, and "
            f"w needs no dim of 0, got an output of {max(height, 0)}x{max(width, 0)} from x "
            f"{x.shape}, w {w.shape} with padding={padding!r}: use larger images, a smaller "
            "filter, padding='SAME' or pool=None"
        )
