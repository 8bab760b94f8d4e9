"""How rows of floating-point numbers become messages of 16 or 8 bits an element, and numbers again.

Messages are integers: XLA for CPU sends bfloat16 as float32, and no compiler widens integers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 256  # neighbours that share a scale: 1.6% more bytes of int8, 0.4% more of fp16


@dataclass(frozen=True)
class Codec:
    """State how rows of numbers are sent.

    Attributes:
      dtype: of a message.
      encode: rows (n, k), float32 or float64, to messages (n, m). Those of a row that is not
        finite are such that what is decoded isn't either.
      decode: (messages (n, m), k, dtype) -> rows (n, k) of that dtype.
      length: k -> m.
    """

    dtype: str
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array, int, Any], jax.Array]
    length: Callable[[int], int]


def _encode_bf16(rows: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)


def _decode_bf16(messages: jax.Array, width: int, dtype: Any) -> jax.Array:
    return lax.bitcast_convert_type(messages, jnp.bfloat16).astype(dtype)


# fp16: each block times the power of two that brings its largest value to between 2**14 and 2**15.


def _encode_fp16(rows: jax.Array) -> jax.Array:
    blocks = _to_blocks(rows)
    exponents = _find_exponents(blocks)
    scaled = blocks * _power_of_two(exponents, rows.dtype)[..., None]
    values = _from_blocks(scaled, rows.shape[1]).astype(jnp.float16)
    return jnp.concatenate(
        [lax.bitcast_convert_type(x, jnp.uint16) for x in (values, exponents)], axis=1
    )


def _find_exponents(blocks: jax.Array) -> jax.Array:
    """Return the power of two for each block, int16; 0 where a value is not finite."""
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    most = jnp.finfo(blocks.dtype).maxexp - 2  # so that it and its inverse are normal numbers
    exponents = jnp.clip(15 - jnp.frexp(largest)[1], -most, most)
    return jnp.where(jnp.isfinite(largest), exponents, 0).astype(jnp.int16)


def _power_of_two(exponents: jax.Array, dtype: Any) -> jax.Array:
    """Return 2**exponents exactly, by the bits of a floating-point number."""
    info = jnp.finfo(dtype)
    whole = jnp.int64 if info.bits == 64 else jnp.int32
    bits = (exponents.astype(whole) + (info.maxexp - 1)) << info.nmant
    return lax.bitcast_convert_type(bits, dtype)


def _decode_fp16(messages: jax.Array, width: int, dtype: Any) -> jax.Array:
    values = lax.bitcast_convert_type(messages[:, :width], jnp.float16).astype(dtype)
    exponents = lax.bitcast_convert_type(messages[:, width:], jnp.int16)
    scaled = _to_blocks(values) * _power_of_two(-exponents, dtype)[..., None]
    return _from_blocks(scaled, width)


# int8: each block in 255 steps, from minus its largest value to that, which is sent as float32.


def _encode_int8(rows: jax.Array) -> jax.Array:
    blocks = _to_blocks(rows)
    steps = (jnp.max(jnp.abs(blocks), axis=-1) / 127).astype(jnp.float32)
    divisors = jnp.where(steps == 0, 1, steps).astype(rows.dtype)
    levels = jnp.clip(jnp.round(blocks / divisors[..., None]), -127, 127).astype(jnp.int8)
    scales = lax.bitcast_convert_type(steps, jnp.int8).reshape(rows.shape[0], -1)
    return jnp.concatenate([_from_blocks(levels, rows.shape[1]), scales], axis=1)


def _decode_int8(messages: jax.Array, width: int, dtype: Any) -> jax.Array:
    levels = _to_blocks(messages[:, :width].astype(dtype))
    scales = messages[:, width:].reshape(messages.shape[0], -1, 4)
    steps = lax.bitcast_convert_type(scales, jnp.float32).astype(dtype)
    return _from_blocks(levels * steps[..., None], width)


def _to_blocks(rows: jax.Array) -> jax.Array:
    """Return rows (n, k) as (n, blocks, BLOCK), with zeros behind the last element."""
    padded = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK)))
    return padded.reshape(rows.shape[0], -1, BLOCK)


def _from_blocks(blocks: jax.Array, width: int) -> jax.Array:
    return blocks.reshape(blocks.shape[0], -1)[:, :width]


def _count_blocks(width: int) -> int:
    return math.ceil(width / BLOCK)


BF16 = Codec("uint16", _encode_bf16, _decode_bf16, lambda width: width)
FP16 = Codec("uint16", _encode_fp16, _decode_fp16, lambda width: width + _count_blocks(width))
INT8 = Codec("int8", _encode_int8, _decode_int8, lambda width: width + 4 * _count_blocks(width))
