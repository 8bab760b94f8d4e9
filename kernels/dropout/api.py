"""The public dropout: what it takes and what it refuses."""

import math

import jax
from jax.typing import ArrayLike

from txcore import varying
from txcore.kernels.common import checks, mosaic_blocks, random_bits
from txcore.kernels.dispatch import registry
from txcore.kernels.dropout import operands, pallas, xla

KERNELS: registry.Kernels = {
    "xla": registry.Kernel(xla.dropout),
    "pallas_triton": registry.Kernel(pallas.dropout, pallas.list_configs),
    "mosaic_tpu": registry.Kernel(
        pallas.dropout, pallas.list_configs, mosaic_blocks.explain_refusal
    ),
}


def dropout(
    x: ArrayLike,
    keys: ArrayLike,
    rate: float,
    *,
    offset: ArrayLike = 0,
    implementation: registry.Implementation | None = None,
    config: pallas.Config | None = None,
) -> jax.Array:
    """Set a random share of the elements to zero, and scale the others to keep the mean.

    The mask is a function of the keys and of counters. The backward pass computes it again, so
    that nothing of x's size is kept for it. Whether an element is dropped depends only on its key
    and its counter, which is its place among the elements of the same key, row by row, plus
    `offset`. The mask is therefore the same under every plan, batch split, `jax.vmap` and
    implementation. The bits are those of `jax.random.bits(key, (elements,))`; an element drops
    where they are below rate * 2**32.

    Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014;
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011. Reverse-mode
    differentiation only, as for `dense`; keys and offset have no gradient.

    Args:
      x: shape (*keys.shape, ...), any floating dtype.
      keys: one key for each example: typed keys as `state.example_keys(batch)` gives them, or
        their words, uint32 of shape (..., 2). Their dims are x's first.
      rate: the share to drop, at least 0 and less than 1: a Python number, since it is part of the
        compiled program.
      offset: the counter of the first element, an integer scalar, traced or not. A shard of
        features passes the place of its first feature in the whole row.
      implementation: None for the fastest known, or a back end by name: "xla", or "pallas" for the
        platform's Pallas kernel (`txcore.kernels.dispatch.back_ends` lists all).
      config: the configuration of the implementation that is named, or None for the best guess.

    Returns:
      x's shape and dtype.

    Raises:
      TypeError: an operand's dtype does not fit, or the rate is traced.
      ValueError: a shape, the rate or the offset does not fit, or shards would repeat one mask.
      NotImplementedError: there is no such implementation of this op.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> keys = jax.random.split(jax.random.key(0), 8)
      >>> float(kernels.dropout(jnp.ones((8, 14, 14, 64)), keys, 0.25).max())
      1.3333333730697632
    """
    (x,) = checks.require_floats("dropout", x=x)
    rate = operands.require_fixed_rate("dropout", "rate", rate)
    words = random_bits.read_key_words("dropout", keys)
    shape = words.shape[:-1]
    if x.shape[: len(shape)] != shape:
        raise ValueError(
            f"dropout: keys needs x's first dims, got x {x.shape}, keys {shape}: pass one key for "
            "each example, for example jax.random.split(key, len(x))"
        )
    count = math.prod(x.shape[len(shape) :])
    first = operands.require_counter("dropout", offset, count)
    operands.refuse_repeated_masks("dropout", count, {"keys": words, "offset": first}, x=x)
    rows = x.reshape(math.prod(shape), count)
    out: jax.Array = registry.run_op(
        "dropout",
        KERNELS,
        *varying.match_varying(rows, words.reshape(-1, 2), first),
        implementation=implementation,
        config=config,
        rate=rate,
    )
    return out.reshape(x.shape)
