"""The public loss of a linear layer's output: what it takes and what it refuses."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from txcore import varying
from txcore.kernels.common import checks
from txcore.kernels.cross_entropy import pallas
from txcore.kernels.cross_entropy.api import class_indices, smoothing_weight
from txcore.kernels.cross_entropy.blocks import ClassBlocks, LossTiles
from txcore.kernels.dispatch import registry
from txcore.kernels.linear_cross_entropy import pallas as linear_pallas
from txcore.kernels.linear_cross_entropy import xla

KERNELS: registry.Kernels = {
    "xla": registry.Kernel(xla.linear_cross_entropy, xla.list_configs),
    "pallas_triton": registry.Kernel(linear_pallas.linear_cross_entropy, pallas.list_configs),
    "mosaic_tpu": registry.Kernel(
        linear_pallas.linear_cross_entropy,
        pallas.list_configs,
        linear_pallas.explain_refusal_on_tpu,
    ),
}


def linear_cross_entropy(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None,
    labels: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    implementation: registry.Implementation | None = None,
    config: ClassBlocks | LossTiles | None = None,
) -> jax.Array:
    """Compute cross_entropy(x @ w + b, labels) without holding the logits.

    Many classes are computed in blocks, and the logits of each block again for the gradient, so
    that only one block's logits are in memory. A layer followed by a loss holds all logits, and
    their gradient in float32. The idea is from Hsu et al. 2024, Liger Kernel,
    https://arxiv.org/abs/2410.10989 (which computes the gradient in the forward pass, and so
    needs the loss to be summed there), and, by blocks of classes, from Wijmans et al. 2024, Cut
    Your Losses in Large-Vocabulary Language Models, https://arxiv.org/abs/2411.09009.

    Logits are never rounded to half precision: products of half-precision operands are added up
    in float32, and each gradient is rounded once. Label smoothing, labels outside [0, classes),
    masked rows, infinite logits and forward-mode differentiation are treated as in
    `cross_entropy`.

    Args:
      x: inputs, shape (..., features), any floating dtype.
      w: weights, shape (features, classes), x's dtype.
      b: bias, shape (classes,), x's dtype; None for none.
      labels: index of the true class, shape (...), any integer dtype.
      label_smoothing: the weight of the uniform distribution, a Python number in [0, 1].
      implementation: None for the fastest known, or a back end by name: "xla", or "pallas" for the
        platform's Pallas kernel (`txcore.kernels.dispatch.back_ends` lists all).
      config: the block sizes (`txcore.kernels.cross_entropy.blocks`): `ClassBlocks` for "xla",
        `LossTiles` for "pallas"; None for the best known.

    Returns:
      The losses, shape (...), float32 (float64 for float64 operands).

    Raises:
      TypeError: an operand is not floating-point, the dtypes differ, or labels are not integers,
        or a configuration of another implementation.
      ValueError: the shapes do not fit, or label_smoothing is not in [0, 1].
      NotImplementedError: there is no such implementation of this op, or it cannot run here.

    Example:
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> x, w, labels = jnp.ones((2, 64)), jnp.zeros((64, 1000)), jnp.array([3, 777])
      >>> losses = kernels.linear_cross_entropy(x, w, None, labels)
      >>> [round(float(loss), 4) for loss in losses]
      [6.9078, 6.9078]
    """
    op = "linear_cross_entropy"
    x, w = checks.require_floats(op, x=x, w=w)
    (b,) = checks.require_floats(op, b=jnp.zeros(w.shape[-1:], w.dtype) if b is None else b)
    checks.require_same_dtype(op, x=x, w=w, b=b)
    labels = class_indices(op, labels)
    smoothing = smoothing_weight(op, label_smoothing)
    _check_shapes(x, w, b, labels)
    return registry.run_op(
        op,
        KERNELS,
        *varying.match_varying(x, w, b, labels),
        implementation=implementation,
        config=config,
        label_smoothing=smoothing,
    )


def _check_shapes(x: jax.Array, w: jax.Array, b: jax.Array, labels: jax.Array) -> None:
    given = f"got x {x.shape}, w {w.shape}, b {b.shape}, labels {labels.shape}"
    if x.ndim < 1 or w.ndim != 2 or b.ndim != 1 or 0 in w.shape:
        raise ValueError(
            "linear_cross_entropy: x needs the dims (..., features), w (features, classes) with "
            "at least one of each, b (classes,) or None, and labels x's dims without features, "
            f"{given}: reshape them to these dims"
        )
    if x.shape[-1] != w.shape[0] or w.shape[1] != b.shape[0]:
        raise ValueError(
            "linear_cross_entropy: w needs x's last dim as its first, and b's length as its last, "
            f"{given}: transpose a weight stored as (classes, features)"
        )
    if x.shape[:-1] != labels.shape:
        raise ValueError(
            "linear_cross_entropy: labels needs x's dims without features, "
            f"{given}: pass one class index for each row of x"
        )
