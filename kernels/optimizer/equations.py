"""The equations of the updates, on arrays of one wide dtype: every implementation computes them."""

import math

import jax
import jax.numpy as jnp


def sgd_momentum(
    p: jax.Array,
    g: jax.Array,
    v: jax.Array,
    rate: jax.Array,
    grad_scale: jax.Array,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> tuple[jax.Array, jax.Array]:
    """Return the new parameter and velocity."""
    d = g * grad_scale
    if weight_decay:  # a compiler cannot drop 0 * p, since p may be infinite
        d = d + weight_decay * p
    v = momentum * v + d
    return p - rate * (d + momentum * v if nesterov else v), v


def adamw(
    p: jax.Array,
    g: jax.Array,
    m: jax.Array,
    v: jax.Array,
    rate: jax.Array,
    grad_scale: jax.Array,
    m_correction: jax.Array,
    v_correction: jax.Array,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the new parameter and moments; the corrections are those of `bias_correction`."""
    g = g * grad_scale
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    change = (m / m_correction) / (jnp.sqrt(v / v_correction) + eps) + weight_decay * p
    return p - rate * change, m, v


def bias_correction(decay: float, count: jax.Array) -> jax.Array:
    """Return 1 - decay**count; computed so, by cancellation, float32 loses four digits at 0.999."""
    return -jnp.expm1(count * math.log(decay)) if decay else jnp.ones_like(count)
