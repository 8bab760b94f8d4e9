"""The mathematics of the losses, by blocks of classes.

The statistics of the blocks of a row's scores combine in any order: the online normalizer of
Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867. Every exponential is of a score minus
the largest one, so that none overflows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from txcore.kernels.common import checks


class Stats(NamedTuple):
    """Hold the statistics of some classes' scores, for each row."""

    top: jax.Array  # the largest score
    total: jax.Array  # the sum of exp(score - top)
    label: jax.Array  # the label's score; 0 where the label is not among these classes
    lag: jax.Array | None  # the sum of top - score; None where nothing is smoothed


class Normalizer(NamedTuple):
    """Hold what turns a row's scores into log-probabilities: score - top - log_total."""

    # Kept apart, since the sum would lose the digits of log_total beside a large `top`.
    top: jax.Array
    log_total: jax.Array


def is_label(labels: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    """Tell for each of the `size` classes from `start` on whether it is the row's label."""
    classes = lax.broadcasted_iota(labels.dtype, (*labels.shape, size), labels.ndim)
    return classes + jnp.asarray(start, labels.dtype) == labels[..., None]


def block_stats(
    scores: jax.Array, chosen: jax.Array, counted: jax.Array | None, smoothing: float
) -> Stats:
    """Compute the statistics of one block of scores.

    Args:
      scores: shape (..., classes of the block).
      chosen: whether a class is the row's label, the same shape.
      counted: which of the classes to count, broadcasting against scores; None for all.
      smoothing: the weight of the uniform distribution.
    """
    if counted is not None:
        counted = checks.lift_rank(counted, scores)
        chosen &= counted
        scores = jnp.where(counted, scores, -jnp.inf)
    # At least the least finite number: with -inf, a block whose classes are all ruled out is NaN.
    top = jnp.maximum(jnp.max(scores, -1), jnp.finfo(scores.dtype).min)
    shifted = scores - top[..., None]
    lag = None
    if smoothing:
        lag = -jnp.sum(shifted if counted is None else jnp.where(counted, shifted, 0), -1)
    label = jnp.sum(jnp.where(chosen, scores, 0), -1)
    return Stats(top, jnp.sum(jnp.exp(shifted), -1), label, lag)


def combine_stats(parts: Stats, counts: np.ndarray) -> Stats:
    """Combine the statistics of all blocks.

    Args:
      parts: the statistics of each block, stacked along a new first dim.
      counts: the number of classes counted in each block.
    """
    top = jnp.max(parts.top, 0)
    rise = top[None] - parts.top
    lag = None
    if parts.lag is not None:
        weights = counts.reshape(-1, *(1,) * (rise.ndim - 1)).astype(rise.dtype)
        lag = jnp.sum(parts.lag + weights * rise, 0)
    total = jnp.sum(parts.total * jnp.exp(-rise), 0)
    return Stats(top, total, jnp.sum(parts.label, 0), lag)


def compute_losses(
    known: Stats, labels: jax.Array, classes: int, smoothing: float
) -> tuple[jax.Array, Normalizer]:
    """Return each row's loss, NaN for a label that is not a class, and its normalizer."""
    log_total = jnp.log(known.total)
    log_total = jnp.where((labels >= 0) & (labels < classes), log_total, jnp.nan)
    loss = log_total
    if smoothing < 1:  # with 1 the term is 0 times a score, NaN for a class that is ruled out
        loss += (1 - smoothing) * (known.top - known.label)
    if known.lag is not None:
        loss += smoothing / classes * known.lag
    return loss, Normalizer(known.top, log_total)


def block_gradient(
    scores: jax.Array,
    chosen: jax.Array,
    normalizer: Normalizer,
    g: jax.Array,
    classes: int,
    smoothing: float,
) -> jax.Array:
    """Return the gradient of a block of scores, given the cotangent g of the rows' losses.

    A row whose loss does not count (its cotangent is 0) has a gradient of 0 even if its label is
    not a class: 0 times the NaN of such a loss would be NaN, and spread to all weights.
    """
    # Masked here, where it is one number for each row, rather than in the block of scores.
    log_total = jnp.where(g != 0, normalizer.log_total, jnp.inf)
    probability = jnp.exp(scores - normalizer.top[..., None] - log_total[..., None])
    wanted = jnp.where(chosen, 1 - smoothing + smoothing / classes, smoothing / classes)
    return (probability - wanted.astype(scores.dtype)) * g[..., None]
