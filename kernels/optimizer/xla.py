"""The updates as elementwise XLA, for its compiler to fuse."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from txcore.kernels import checks


def sgd_momentum(
    param: jax.Array,
    grad: jax.Array,
    velocity: jax.Array,
    learning_rate: ArrayLike,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    grad_scale: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Compute the op of `txcore.kernels.sgd_momentum` on checked operands."""
    p, g, v = _widen(param, grad, velocity)
    g = g * jnp.asarray(grad_scale, p.dtype) + weight_decay * p
    v = momentum * v + g
    step = g + momentum * v if nesterov else v
    new = p - jnp.asarray(learning_rate, p.dtype) * step
    return new.astype(param.dtype), v.astype(velocity.dtype)


def adamw(
    param: jax.Array,
    grad: jax.Array,
    m: jax.Array,
    v: jax.Array,
    step: ArrayLike,
    learning_rate: ArrayLike,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    grad_scale: ArrayLike,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the op of `txcore.kernels.adamw` on checked operands."""
    p, g, new_m, new_v = _widen(param, grad, m, v)
    g = g * jnp.asarray(grad_scale, p.dtype)
    count = jnp.asarray(step, p.dtype) + 1
    new_m = b1 * new_m + (1 - b1) * g
    new_v = b2 * new_v + (1 - b2) * g * g
    mean = new_m / _bias_correction(b1, count)
    root = jnp.sqrt(new_v / _bias_correction(b2, count))
    new = p - jnp.asarray(learning_rate, p.dtype) * (mean / (root + eps) + weight_decay * p)
    return new.astype(param.dtype), new_m.astype(m.dtype), new_v.astype(v.dtype)


def _widen(*arrays: jax.Array) -> list[jax.Array]:
    dtype = checks.accumulator(arrays[0].dtype)
    return [array.astype(dtype) for array in arrays]


def _bias_correction(decay: float, count: jax.Array) -> ArrayLike:
    # 1 - decay**count without the cancellation that costs float32 four digits at 0.999.
    return -jnp.expm1(count * math.log(decay)) if decay else 1.0
