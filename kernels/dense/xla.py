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
      transposed_dx: whether as (w g^T)^T. Alone, that takes two thirds of the time at 64 rows on
        CPU, since XLA packs the right operand of a product once for each of its blocks. It is
        never the best guess: XLA then does not fuse what follows, and the whole MNIST step is not
        faster.
    """

    transposed_dx: bool


def list_configs(problem: Problem) -> Sequence[Config]:
    """Return the configurations worth trying, the best guess first."""
    if problem.platform != "cpu":
        return (Config(False),)
    return Config(False), Config(True)


# The op has its own VJP for two reasons. In the backward products, half-precision operands meet a
# cotangent of their own dtype (with autodiff it would be float32). And the output serves as the
# mask of ReLU and of dropout. XLA:CPU itself widens half-precision operands to float32, as fast as
# a cast here would.
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
    y = y + checks.lift_rank(b.astype(dtype), y)
    kept = _dropout_mask(words, offset, w.shape[1], dropout)
    out = elementwise.apply_activation(y, activation, dropout, kept).astype(x.dtype)
    saved = out if activation == "relu" else None
    if elementwise.saves_input(activation):
        saved = y.astype(x.dtype)
    return out, (x, w, saved, words, offset)


def _dropout_mask(
    words: jax.Array | None, offset: jax.Array | None, features: int, dropout: float
) -> jax.Array | None:
    if words is None or offset is None:
        return None
    return random_bits.keep_mask_of_rows(words, offset, features, dropout)


def backward(
    activation: str | None, dropout: float, config: Config, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    """Return the gradients of x, w and b from what the forward pass kept."""
    x, w, saved, words, offset = residuals
    dtype = checks.accumulator(x.dtype)
    needs_mask = elementwise.needs_mask(activation, dropout)
    kept = _dropout_mask(words, offset, w.shape[1], dropout) if needs_mask else None
    if saved is not None:
        saved = saved.astype(dtype)
    dy = elementwise.apply_derivative(g.astype(dtype), saved, activation, dropout, kept)
    rows = dy.astype(x.dtype).reshape(-1, w.shape[1])
    db = jnp.sum(dy.reshape(rows.shape), 0)
    dw = jnp.matmul(x.reshape(-1, w.shape[0]).T, rows, preferred_element_type=dtype)
    dx = _input_gradient(rows, w, config).astype(x.dtype).reshape(x.shape)
    return dx, dw.astype(w.dtype), db.astype(g.dtype), None, None


def _input_gradient(rows: jax.Array, w: jax.Array, config: Config) -> jax.Array:
    dtype = checks.accumulator(w.dtype)
    if not config.transposed_dx:
        return jnp.matmul(rows, w.T, preferred_element_type=dtype)
    # Without the barrier, XLA moves the transposition back to the weights.
    return lax.optimization_barrier(jnp.matmul(w, rows.T, preferred_element_type=dtype)).T


_dense.defvjp(_forward, backward)
