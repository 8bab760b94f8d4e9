"""The public loss: what it takes and what it refuses."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from txcore import _compat
from txcore.kernels import checks, registry
from txcore.kernels.cross_entropy import xla

KERNELS: registry.Kernels = {"xla": registry.Kernel(xla.cross_entropy)}


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    implementation: registry.Implementation | None = None,
) -> jax.Array:
    """Compute the softmax cross-entropy of each example, -log softmax(logits)[label].

    A label outside [0, classes) gives NaN, in the loss and in the gradient of its example: it
    cannot be refused, since labels are known only when the program runs. Reverse-mode
    differentiation only: the op has its own VJP, so `jax.jvp`, `jax.jacfwd` and `jax.hessian`
    raise jax's error about forward-mode on a custom_vjp function.

    Args:
      logits: unnormalised log-probabilities, shape (..., classes), any floating dtype.
      labels: index of the true class, shape (...), any integer dtype.
      implementation: None for the fastest known, or "xla".

    Returns:
      The losses, shape (...), float32 (float64 for float64 logits).

    Raises:
      TypeError: logits are not floating-point, or labels not integers.
      ValueError: the shapes do not fit.
      NotImplementedError: there is no such implementation of this op.

    Example:
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> losses = kernels.cross_entropy(jnp.zeros((2, 10)), jnp.array([3, 7]))
      >>> [round(float(loss), 4) for loss in losses]
      [2.3026, 2.3026]
    """
    (logits,) = checks.float_arrays("cross_entropy", logits=logits)
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"cross_entropy: labels must have an integer dtype; got {labels.dtype}. "
            "Pass the class index, not a one-hot row (jnp.argmax(labels, -1) gives it)."
        )
    if logits.ndim < 1 or logits.shape[:-1] != labels.shape or logits.shape[-1] == 0:
        raise ValueError(
            "cross_entropy: logits must have the dims (..., classes) with at least one class, "
            f"and labels the same dims without classes; got logits {logits.shape}, labels "
            f"{labels.shape}. Pass one class index for each row of logits."
        )
    if labels.dtype.itemsize < 4:  # uint8 labels, say, cannot count 300 classes
        labels = labels.astype(jnp.int32)
    return registry.run(
        "cross_entropy",
        KERNELS,
        *_compat.match_varying(logits, labels),
        implementation=implementation,
    )
