"""bfloat16 is sent, and averaged in float32 by the device whose block it is."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from txcore import varying
from txcore.collectives import all_gather, all_to_all, axis_size
from txcore.parallel.gradients.algorithms.record import (
    Axes,
    Sizes,
    claim_equal,
    count_devices,
    pad_to_blocks,
    predict_sent,
)
from txcore.parallel.predicted import Predicted


def narrow_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average what is sent as bfloat16, and gather it as bfloat16."""
    blocks = pad_to_blocks(flat, axis_size(axes))
    part = _average_narrow(blocks, axes, name)
    whole = all_gather(_to_bits(part), axes, invariant=True, name=name)
    return claim_equal(_from_bits(whole, flat.dtype)[: flat.size], axes)


def narrow_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average what is sent as bfloat16, in float32 or wider."""
    return _average_narrow(blocks, axes, name).astype(blocks.dtype)


def _average_narrow(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Return the mean of this device's block, in float32 or wider."""
    wide = jnp.promote_types(blocks.dtype, jnp.float32)
    bits = all_to_all(_to_bits(blocks), axes, split_dim=0, concat_dim=0, name=name)
    mean = jnp.mean(_from_bits(bits, wide), axis=0)
    return varying.claim(mean, varying.MEAN_SHARD, axes)


# As bits, or XLA for CPU sends the gathered bfloat16 as float32.
def _to_bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def _from_bits(bits: jax.Array, dtype: DTypeLike) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.bfloat16).astype(dtype)


def send_narrow(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `narrow_mean` sends."""
    padded = elements + -elements % count_devices(sizes)
    return [
        predict_sent("all-to-all", sizes, "uint16", padded),
        predict_sent("all-gather", sizes, "uint16", padded),
    ]


def send_scattered_narrow(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `narrow_blocks` sends."""
    return [predict_sent("all-to-all", sizes, "uint16", elements)]
