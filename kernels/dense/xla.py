"""The dense layer in XLA's own ops."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from txcore.kernels.common import checks, random_bits
from txcore.kernels.dense import elementwise
from txcore.kernels.dispatch.problem import Problem

Residuals = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]


@dataclass(frozen=True)
class Config:
    """Hold how x's gradient is computed.

    Args:
      transposed_dx: as (w g^T)^T, which by itself takes two thirds of the time at 64 rows on CPU,
        since XLA packs the right operand of a product in each of its blocks. It is never the
        guess: what follows is then not fused, and in the whole MNIST step it gains nothing.
    """

    transposed_dx: bool


def configs(problem: Problem) -> Sequence[Config]:
    """Return the configurations worth trying, the best guess first."""
    if problem.platform != "cpu":
        return (Config(False),)
    return Config(False), Config(True)


# Its own VJP, so that half-precision operands meet a cotangent of their own dtype in the
# backward products (autodiff would mix it with float32), and the output serves as ReLU's mask
# and dropout's. XLA:CPU widens half operands to float32 by itself, at no cost over doing it here.
def dense(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    words: jax.Array | None = None,
    offset: jax.Array | None = None,
    *,
    config: Config,
    activation: str | None,
    dropout: float,
) -> jax.Array:
    """Compute the op of `txcore.kernels.dense` on checked operands."""
    return _dense(x, w, b, words, offset, activation, dropout, config)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _dense(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    words: jax.Array | None,
    offset: jax.Array | None,
    activation: str | None,
    dropout: float,
    config: Config,
) -> jax.Array:
    return _forward(x, w, b, words, offset, activation, dropout, config)[0]


def _forward(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    words: jax.Array | None,
    offset: jax.Array | None,
    activation: str | None,
    dropout: float,
    config: Config,
) -> tuple[jax.Array, Residuals]:
    dtype = checks.accumulator(x.dtype)
    y = jnp.matmul(x, w, preferred_element_type=dtype)
    y = y + checks.lift(b.astype(dtype), y)
    kept = _mask(words, offset, w.shape[1], dropout)
    out = elementwise.apply(y, activation, dropout, kept).astype(x.dtype)
    saved = out if activation == "relu" else None
    if elementwise.saves_input(activation):
        saved = y.astype(x.dtype)
    return out, (x, w, saved, words, offset)


def _mask(
    words: jax.Array | None, offset: jax.Array | None, features: int, dropout: float
) -> jax.Array | None:
    if words is None or offset is None:
        return None
    return random_bits.keep_rows(words, offset, features, dropout)


def _backward(
    activation: str | None, dropout: float, config: Config, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    x, w, saved, words, offset = residuals
    dtype = checks.accumulator(x.dtype)
    needs_mask = elementwise.needs_mask(activation, dropout)
    kept = _mask(words, offset, w.shape[1], dropout) if needs_mask else None
    if saved is not None:
        saved = saved.astype(dtype)
    dy = elementwise.derivative(g.astype(dtype), saved, activation, dropout, kept)
    rows = dy.astype(x.dtype).reshape(-1, w.shape[1])
    db = jnp.sum(dy.reshape(rows.shape), 0)
    dw = jnp.matmul(x.reshape(-1, w.shape[0]).T, rows, preferred_element_type=dtype)
    dx = _input_gradient(rows, w, config).astype(x.dtype).reshape(x.shape)
    return dx, dw.astype(w.dtype), db.astype(g.dtype), None, None


def _input_gradient(rows: jax.Array, w: jax.Array, config: Config) -> jax.Array:
    dtype = checks.accumulator(w.dtype)
    if not config.transposed_dx:
        return jnp.matmul(rows, w.T, preferred_element_type=dtype)
    # Without the barrier XLA moves the transposition back onto the weights.
    return lax.optimization_barrier(jnp.matmul(w, rows.T, preferred_element_type=dtype)).T


_dense.defvjp(_forward, _backward)
