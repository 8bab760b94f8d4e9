"""The dense layer in XLA's own ops."""

from functools import partial

import jax
import jax.numpy as jnp

from txcore.kernels import checks

Residuals = tuple[jax.Array, jax.Array, jax.Array | None]


# Its own VJP, so that half-precision operands meet a cotangent of their own dtype in the
# backward products (autodiff would mix it with float32), and the output serves as ReLU's mask.
def dense(
    x: jax.Array, w: jax.Array, b: jax.Array, *, config: None, activation: str | None
) -> jax.Array:
    """Compute the op of `txcore.kernels.dense` on checked operands."""
    return _dense(x, w, b, activation)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dense(x: jax.Array, w: jax.Array, b: jax.Array, activation: str | None) -> jax.Array:
    return _forward(x, w, b, activation)[0]


def _forward(
    x: jax.Array, w: jax.Array, b: jax.Array, activation: str | None
) -> tuple[jax.Array, Residuals]:
    dtype = checks.accumulator(x.dtype)
    out = jnp.matmul(x, w, preferred_element_type=dtype) + b.astype(dtype)
    if activation == "relu":
        out = jnp.maximum(out, 0)
    out = out.astype(x.dtype)
    return out, (x, w, out if activation == "relu" else None)


def _backward(
    activation: str | None, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, w, out = residuals
    if out is not None:
        g = jnp.where(out > 0, g, 0)
    dtype = checks.accumulator(x.dtype)
    rows = g.reshape(-1, g.shape[-1])
    dx = jnp.matmul(g, w.T, preferred_element_type=dtype)
    dw = jnp.matmul(x.reshape(-1, x.shape[-1]).T, rows, preferred_element_type=dtype)
    db = jnp.sum(rows, 0, dtype=dtype)
    return dx.astype(x.dtype), dw.astype(w.dtype), db.astype(g.dtype)


_dense.defvjp(_forward, _backward)
