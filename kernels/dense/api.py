"""The public dense layer: what it takes and what it refuses."""

from typing import Literal

import jax
from jax.typing import ArrayLike

from txcore import _compat
from txcore.kernels import checks, registry
from txcore.kernels.dense import xla

KERNELS: registry.Kernels = {"xla": registry.Kernel(xla.dense)}


def dense(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike,
    *,
    activation: Literal["relu"] | None = None,
    implementation: registry.Implementation | None = None,
) -> jax.Array:
    """Compute activation(x @ w + b).

    Half-precision operands are accumulated in float32 and the result is rounded once.
    Reverse-mode differentiation only: the op has its own VJP, so `jax.jvp`, `jax.jacfwd` and
    `jax.hessian` raise jax's error about forward-mode on a custom_vjp function.

    Args:
      x: inputs, shape (..., in_features), any floating dtype.
      w: weights, shape (in_features, out_features), x's dtype.
      b: bias, shape (out_features,), x's dtype.
      activation: None or "relu".
      implementation: None for the fastest known, or "xla".

    Returns:
      Shape (..., out_features), x's dtype.

    Raises:
      TypeError: an operand is not floating-point, or the dtypes differ.
      ValueError: a shape or an option does not fit.
      NotImplementedError: there is no such implementation of this op.

    Example:
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> kernels.dense(jnp.ones((8, 784)), jnp.ones((784, 128)), jnp.zeros(128)).shape
      (8, 128)
    """
    x, w, b = checks.float_arrays("dense", x=x, w=w, b=b)
    checks.same_dtype("dense", x=x, w=w, b=b)
    checks.one_of("dense", "activation", activation, (None, "relu"))
    given = f"got x {x.shape}, w {w.shape}, b {b.shape}."
    if x.ndim < 1 or w.ndim != 2 or b.ndim != 1:
        raise ValueError(
            "dense: x must have the dims (..., in_features), w (in_features, out_features) and "
            f"b (out_features,); {given}"
        )
    if x.shape[-1] != w.shape[0] or w.shape[1] != b.shape[0]:
        raise ValueError(
            "dense: x's last dim must equal w's first, and w's last dim b's length; "
            f"{given} Flatten images first; transpose a weight stored as (out, in)."
        )
    return registry.run(
        "dense",
        KERNELS,
        *_compat.match_varying(x, w, b),
        implementation=implementation,
        activation=activation,
    )
