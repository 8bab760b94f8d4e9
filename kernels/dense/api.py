"""The public dense layer: what it takes and what it refuses."""

from typing import Literal

import jax
from jax.typing import ArrayLike

from txcore import varying
from txcore.kernels.common import checks, random_bits
from txcore.kernels.dense import elementwise, mosaic_gpu, pallas, xla
from txcore.kernels.dispatch import registry
from txcore.kernels.dropout import operands

Activation = Literal["relu", "gelu", "tanh", "silu"] | None

KERNELS: registry.Kernels = {
    "xla": registry.Kernel(xla.dense, xla.list_configs),
    "pallas_triton": registry.Kernel(pallas.dense, pallas.list_configs),
    "mosaic_gpu": registry.Kernel(
        mosaic_gpu.dense, mosaic_gpu.list_configs, mosaic_gpu.explain_refusal
    ),
    "mosaic_tpu": registry.Kernel(pallas.dense, pallas.list_configs, pallas.explain_refusal_on_tpu),
}


def dense(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike,
    *,
    activation: Activation = None,
    dropout: float = 0.0,
    keys: ArrayLike | None = None,
    offset: ArrayLike = 0,
    implementation: registry.Implementation | None = None,
    config: xla.Config | pallas.Config | mosaic_gpu.Config | None = None,
) -> jax.Array:
    """Compute dropout(activation(x @ w + b)).

    Half-precision operands are accumulated in float32 and the result is rounded once. Dropout is
    that of `txcore.kernels.dropout`: whether an output is dropped depends only on its row's key
    and its feature's number, and no mask is kept for the backward pass. Where the output features
    are split over a mesh axis, `offset` is the number of the shard's first feature, so that the
    mask is that of the whole layer. (Where the input features are split, add up the shards'
    products first, activate the sum, and call `dropout`.)

    Reverse-mode differentiation only: the op has its own VJP, so `jax.jvp`, `jax.jacfwd` and
    `jax.hessian` raise jax's error about forward-mode on a custom_vjp function. Keys and offset
    have no gradient.

    Args:
      x: inputs, shape (..., in_features), any floating dtype.
      w: weights, shape (in_features, out_features), x's dtype.
      b: bias, shape (out_features,), x's dtype.
      activation: None, "relu", "gelu" (by tanh, as `jax.nn.gelu`'s default), "tanh" or "silu".
      dropout: the share of the outputs to drop, at least 0 and less than 1: a Python number, since
        it is part of the compiled program.
      keys: with dropout one key for each row: typed keys of shape x.shape[:-1], as
        `state.example_keys(batch)` gives for x of shape (batch, in_features), or their words,
        uint32 of shape (*x.shape[:-1], 2). Without dropout None.
      offset: the number of w's first output feature in the whole layer, an integer scalar, traced
        or not: `tx.axis_index(axis) * w.shape[1]` for a shard. Only dropout uses it.
      implementation: None for the fastest known, or a back end by name: "xla", or "pallas" for the
        platform's Pallas kernel (`txcore.kernels.dispatch.back_ends` lists all).
      config: the configuration of the implementation that is named, or None for the best guess.

    Returns:
      Shape (..., out_features), x's dtype.

    Raises:
      TypeError: an operand's dtype does not fit, or the dropout rate is traced.
      ValueError: a shape or an option does not fit, there are keys without dropout or dropout
        without keys, or shards would repeat one mask.
      NotImplementedError: there is no such implementation of this op.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> keys = jax.random.split(jax.random.key(0), 8)
      >>> x, w, b = jnp.ones((8, 784)), jnp.ones((784, 128)), jnp.zeros(128)
      >>> kernels.dense(x, w, b, activation="relu", dropout=0.25, keys=keys).shape
      (8, 128)
    """
    x, w, b = checks.require_floats("dense", x=x, w=w, b=b)
    checks.require_same_dtype("dense", x=x, w=w, b=b)
    checks.require_one_of("dense", "activation", activation, tuple(elementwise.ACTIVATIONS))
    _check_shapes(x, w, b)
    rate = operands.require_fixed_rate("dense", "dropout", dropout)
    seeds = _check_mask_operands(x, w, b, rate, keys, offset)
    return registry.run_op(
        "dense",
        KERNELS,
        *varying.match_varying(x, w, b, *seeds),
        implementation=implementation,
        config=config,
        activation=activation,
        dropout=rate,
    )


def _check_shapes(x: jax.Array, w: jax.Array, b: jax.Array) -> None:
    given = f"got x {x.shape}, w {w.shape}, b {b.shape}"
    if x.ndim < 1 or w.ndim != 2 or b.ndim != 1:
        raise ValueError(
            "dense: x needs the dims (..., in_features), w (in_features, out_features) and "
            f"b (out_features,), {given}: reshape them to these dims"
        )
    if x.shape[-1] != w.shape[0] or w.shape[1] != b.shape[0]:
        raise ValueError(
            "dense: w needs x's last dim as its first, and b's length as its last, "
            f"{given}: flatten images first, and transpose a weight stored as (out, in)"
        )


def _check_mask_operands(
    x: jax.Array, w: jax.Array, b: jax.Array, rate: float, keys: ArrayLike | None, offset: ArrayLike
) -> tuple[jax.Array, ...]:
    """Return the operands of dropout's mask, the keys' words and the offset; none without it."""
    if rate == 0:
        if keys is not None:
            raise ValueError(
                "dense: keys= needs a dropout rate above 0, got dropout=0: leave keys out, or "
                "pass the rate"
            )
        return ()
    if keys is None:
        raise ValueError(
            f"dense: dropout needs keys, one for each row of x, got dropout={rate} alone: pass "
            "keys=state.example_keys(batch) or jax.random.split(key, len(x)), or dropout=0.0 to "
            "evaluate"
        )
    words = random_bits.read_key_words("dense", keys)
    if words.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            "dense: keys needs the shape of x without its last dim, got x "
            f"{x.shape}, keys {words.shape[:-1]}: pass one key for each row of x"
        )
    first = operands.require_counter("dense", offset, w.shape[1])
    operands.refuse_repeated_masks(
        "dense", w.shape[1], {"keys": words, "offset": first}, x=x, w=w, b=b
    )
    return words, first
