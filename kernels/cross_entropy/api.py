"""The public loss of logits: what it takes and what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from txcore import varying
from txcore.kernels.common import checks, mosaic_blocks
from txcore.kernels.cross_entropy import mosaic, pallas, pallas_rows, xla
from txcore.kernels.cross_entropy.blocks import ClassBlocks
from txcore.kernels.cross_entropy.pallas_rows import LossRuns
from txcore.kernels.dispatch import registry

KERNELS: registry.Kernels = {
    "xla": registry.Kernel(xla.cross_entropy, xla.list_configs),
    "pallas_triton": registry.Kernel(
        pallas_rows.cross_entropy, pallas_rows.list_configs, pallas_rows.explain_refusal
    ),
    "mosaic_tpu": registry.Kernel(
        mosaic.cross_entropy, pallas.list_configs, mosaic_blocks.explain_refusal
    ),
}


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    implementation: registry.Implementation | None = None,
    config: ClassBlocks | LossRuns | None = None,
) -> jax.Array:
    """Compute the softmax cross-entropy of each example, -log softmax(logits)[label].

    With `label_smoothing` s and K classes the label's distribution is mixed with the uniform one
    (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7), as PyTorch does:

        loss = (1 - s) * nll(label) + s / K * sum over the classes k of nll(k),
        nll(k) = -log softmax(logits)[k]

    A logit of -inf rules its class out: the probability is 0, and so is the gradient without
    smoothing. With smoothing the loss is infinite.

    Many classes are read in blocks, once for the losses and once for the gradient, so that
    neither the probabilities nor half-precision logits are ever held in float32 as a whole. The
    sums of the blocks combine as in Milakov & Gimelshein 2018,
    https://arxiv.org/abs/1805.02867. `linear_cross_entropy` does not even hold the logits.

    A label outside [0, classes), such as a negative one, makes NaN of the loss and of the gradient
    of its example. It cannot be refused, since labels are known only when the program runs.
    (optax takes -1 for the last class, and for other such labels returns NaN with a finite
    gradient.)

    A row whose loss does not count (its cotangent is 0) has a gradient of 0, whatever its label
    is. Its logits must be finite or -inf, since 0 * NaN is NaN. Mask by
    `jnp.where(mask, losses, 0)` or `tx.example_mean(losses, mask)`, not by a product, whose value
    would be NaN. PyTorch's ignore_index=-100 is the mask `labels != -100`.

    Reverse-mode differentiation only: the op has its own VJP, so `jax.jvp`, `jax.jacfwd` and
    `jax.hessian` raise jax's error about forward-mode on a custom_vjp function.

    Args:
      logits: unnormalised log-probabilities, shape (..., classes), any floating dtype.
      labels: index of the true class, shape (...), any integer dtype.
      label_smoothing: the weight s of the uniform distribution, a Python number in [0, 1].
      implementation: None for the fastest known, or a back end by name: "xla", or "pallas" for the
        platform's Pallas kernel (`txcore.kernels.dispatch.back_ends` lists all).
      config: `blocks.ClassBlocks` for "xla" or `pallas_rows.LossRuns` for "pallas_triton" (both in
        `txcore.kernels.cross_entropy`); None for the best known.

    Returns:
      The losses, shape (...), float32 (float64 for float64 logits).

    Raises:
      TypeError: logits are not floating-point, or labels not integers, or a configuration of
        another implementation.
      ValueError: the shapes do not fit, or label_smoothing is not in [0, 1].
      NotImplementedError: there is no such implementation of this op, or it cannot run here.

    Example:
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> losses = kernels.cross_entropy(jnp.zeros((2, 10)), jnp.array([3, 7]))
      >>> [round(float(loss), 4) for loss in losses]
      [2.3026, 2.3026]
    """
    (logits,) = checks.require_floats("cross_entropy", logits=logits)
    labels = class_indices("cross_entropy", labels)
    smoothing = smoothing_weight("cross_entropy", label_smoothing)
    if logits.ndim < 1 or logits.shape[:-1] != labels.shape or logits.shape[-1] == 0:
        raise ValueError(
            "cross_entropy: logits needs the dims (..., classes) with at least one class, and "
            f"labels the same dims without classes, got logits {logits.shape}, labels "
            f"{labels.shape}: pass one class index for each row of logits"
        )
    return registry.run_op(
        "cross_entropy",
        KERNELS,
        *varying.match_varying(logits, labels),
        implementation=implementation,
        config=config,
        label_smoothing=smoothing,
    )


def class_indices(op: str, labels: ArrayLike) -> jax.Array:
    """Return the labels in a dtype that counts any number of classes, or refuse them."""
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"{op}: labels needs an integer dtype, got {labels.dtype}: "
            "pass the class index, not a one-hot row (jnp.argmax(labels, -1) gives it)"
        )
    return labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels


def smoothing_weight(op: str, value: Any) -> float:
    """Return label_smoothing as a float, or refuse it."""
    if not isinstance(value, int | float | np.floating) or not 0 <= value <= 1:
        raise ValueError(
            f"{op}: label_smoothing needs a Python number in [0, 1], known when the program is "
            f"traced, got {value!r}: pass 0.1, say, or leave it out for none"
        )
    return float(value)
