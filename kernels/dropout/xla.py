"""Dropout in XLA's own ops."""

from functools import partial

import jax
import jax.numpy as jnp

from txcore.kernels.common import checks, random_bits


def dropout(
    x: jax.Array, words: jax.Array, offset: jax.Array, *, config: None, rate: float
) -> jax.Array:
    """Compute the op of `txcore.kernels.dropout` on rows with one key each."""
    return _dropout(x, words, offset, rate)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dropout(x: jax.Array, words: jax.Array, offset: jax.Array, rate: float) -> jax.Array:
    kept = random_bits.keep_mask_of_rows(words, offset, x.shape[-1], rate)
    wide = x.astype(checks.accumulator(x.dtype))
    return jnp.where(kept, wide / random_bits.keep_share(rate), 0).astype(x.dtype)


def _forward(
    x: jax.Array, words: jax.Array, offset: jax.Array, rate: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dropout(x, words, offset, rate), (words, offset)


def _backward(
    rate: float, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, None, None]:
    return _dropout(g, *residuals, rate), None, None


_dropout.defvjp(_forward, _backward)
