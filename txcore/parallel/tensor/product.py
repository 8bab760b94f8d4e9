"""The product of a dense layer, in the form that compilers are fast at."""

import math

import jax


def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return `x @ w` of all rows of `x` as one matrix.

    With the dims of `x` apart, the gradient of `w` contracts two of them: XLA for CPU transposes
    its operands for that, and computes what they are made of once more, in the wrong order.

    Args:
      x: shape (..., in).
      w: shape (in, out).
    """
    rows, width = x.shape[:-1], w.shape[-1]
    return (x.reshape(math.prod(rows), x.shape[-1]) @ w).reshape(*rows, width)
