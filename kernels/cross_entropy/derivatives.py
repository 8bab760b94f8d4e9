"""The loss of logits and its gradient, of a kernel for each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from txcore.kernels.cross_entropy import online

Residuals = tuple[jax.Array, jax.Array, online.Normalizer]


def make_cross_entropy(
    compute_stats: Callable[..., online.Stats], compute_gradient: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """Return the op of `txcore.kernels.cross_entropy` on checked operands.

    Args:
      compute_stats: `compute_stats(logits, labels, config, smoothing)` of rows of logits.
      compute_gradient: `compute_gradient(logits, labels, normalizer, g, config, smoothing)`.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(2, 3))
    def of_rows(logits: jax.Array, labels: jax.Array, config: Any, smoothing: float) -> jax.Array:
        return forward(logits, labels, config, smoothing)[0]

    def forward(
        logits: jax.Array, labels: jax.Array, config: Any, smoothing: float
    ) -> tuple[jax.Array, Residuals]:
        known = compute_stats(logits, labels, config, smoothing)
        losses, normalizer = online.compute_losses(known, labels, logits.shape[1], smoothing)
        return losses, (logits, labels, normalizer)

    def backward(
        config: Any, smoothing: float, residuals: Residuals, g: jax.Array
    ) -> tuple[jax.Array, None]:
        return compute_gradient(*residuals, g, config, smoothing), None

    of_rows.defvjp(forward, backward)

    def cross_entropy(
        logits: jax.Array, labels: jax.Array, *, config: Any, label_smoothing: float
    ) -> jax.Array:
        rows = logits.reshape(-1, logits.shape[-1])
        return of_rows(rows, labels.reshape(-1), config, label_smoothing).reshape(labels.shape)

    return cross_entropy
