"""The activation and the dropout after the product, and their derivative, for every back end."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from txcore.kernels.common import random_bits

ACTIVATIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda y: y,
    "relu": lambda y: jnp.maximum(y, 0),
    "gelu": lambda y: jax.nn.gelu(y, approximate=True),
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
}


def apply_activation(
    y: jax.Array, activation: str | None, dropout: float, kept: jax.Array | None
) -> jax.Array:
    """Activate, drop the elements where `kept` is false (None keeps all), and scale the rest."""
    return _drop_elements(ACTIVATIONS[activation](y), dropout, kept)


def saves_input(activation: str | None) -> bool:
    """Tell whether the derivative needs the activation's input; ReLU's needs the output."""
    return activation not in (None, "relu")


def needs_mask(activation: str | None, dropout: float) -> bool:
    """Tell whether the derivative needs dropout's mask; ReLU's output shows what was dropped."""
    return dropout > 0 and activation != "relu"


def apply_derivative(
    g: jax.Array,
    saved: jax.Array | None,
    activation: str | None,
    dropout: float,
    kept: jax.Array | None,
) -> jax.Array:
    """Return the gradient at the activation's input.

    Args:
      g: the gradient at the output.
      saved: the output for "relu", None for no activation, the activation's input for the others.
      activation: as for `dense`.
      dropout: as for `dense`.
      kept: dropout's mask where `needs_mask`.
    """
    if saved is None:
        return _drop_elements(g, dropout, kept)
    if activation == "relu":
        return _drop_elements(g, dropout, jnp.greater(saved, 0))
    g = _drop_elements(g, dropout, kept)
    (dy,) = jax.vjp(ACTIVATIONS[activation], saved)[1](g)
    return dy


def _drop_elements(y: jax.Array, dropout: float, kept: jax.Array | None) -> jax.Array:
    if kept is None:
        return y
    return jnp.where(kept, y / random_bits.keep_share(dropout) if dropout else y, 0)
