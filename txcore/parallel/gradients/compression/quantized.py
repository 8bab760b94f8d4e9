"""Averages of numbers in 16 or 8 bits: each device adds up one share of them, in float32.

Messages go to the devices of their shares (all-to-all), which decode, average and encode again;
all devices then gather the means. So no sum is ever narrow, and there are two roundings.
"""

from functools import partial
from typing import Any

import jax
from jax import lax

from txcore import varying
from txcore.collectives import all_gather, all_to_all, axis_index
from txcore.parallel.gradients.algorithms.record import pad_to_blocks
from txcore.parallel.gradients.compression import codecs, rows
from txcore.parallel.gradients.compression.codecs import Codec
from txcore.parallel.gradients.compression.record import Compression, Exchange
from txcore.parallel.predicted import Predicted


def bf16() -> Compression:
    """Send bfloat16, half the bytes of float32; sums are float32.

    It keeps nothing. A mean is rounded twice, to 8 bits of mantissa.

    Returns:
      A compression for `DP(compression=)`, which also takes it by its name, "bf16".

    Example:
      >>> tx.DP("data", compression="bf16").axes
      ('data',)
    """
    return _make_compression("bf16()", codecs.BF16, feedback=False)


def fp16() -> Compression:
    """Send float16, half the bytes of float32, and a power of two for each 256; sums are float32.

    The power of two brings the largest of them to the end of float16's range: no value overflows,
    and those less than 2**-29 of the largest lose digits. It keeps nothing. A mean is rounded
    twice, to 11 bits of mantissa.

    Returns:
      A compression for `DP(compression=)`, which also takes it by its name, "fp16".

    Example:
      >>> def f(g):  # beyond float16's largest number
      ...     return tx.sync_gradients(g, "data", compression="fp16")[0]
      >>> run = tx.testing.run_sharded
      >>> run(f, np.float32([2.0**100, 2.0**102]), axes={"data": 2}, out_specs=P()) / 2.0**100
      array([2.5], dtype=float32)
    """
    return _make_compression("fp16()", codecs.FP16, feedback=False)


def int8(*, feedback: bool = True) -> Compression:
    """Send int8, a quarter of the bytes of float32, and a scale for each 256; sums are float32.

    Each device keeps what both roundings left over, and adds it to its next gradients.

    Args:
      feedback: False to keep nothing, and lose what is left over. `DP(shard="gradients")` and
        "parameters" need that: kept, it is as large as all gradients, on each device.

    Returns:
      A compression for `DP(compression=)`, which also takes it by its name, "int8".

    Raises:
      TypeError: `feedback` is no bool.

    Example:
      >>> tx.DP("data", compression=tx.compression.int8())
      DP(axis='data', compression=int8())

    References:
      Tang et al., "DoubleSqueeze", 2019 (error feedback of both roundings).
    """
    if not isinstance(feedback, bool):
        raise TypeError(f"int8 needs feedback= True or False, got {feedback!r}")
    options = "" if feedback else "feedback=False"
    return _make_compression(f"int8({options})", codecs.INT8, feedback=feedback)


def _make_compression(name: str, codec: Codec, *, feedback: bool) -> Compression:
    return Compression(
        name,
        partial(_average_quantized, codec),
        partial(_predict_sends, codec),
        feedback=feedback,
        scatters=True,
    )


def _average_quantized(
    codec: Codec, grads: list[jax.Array], kept: list[Any], exchange: Exchange
) -> tuple[list[jax.Array], list[jax.Array], list[Any]]:
    shapes = [g.shape for g in grads]
    if not exchange.parts:
        mean, error = _average_flat(codec, rows.flatten(grads), exchange)
        return rows.unflatten(mean, shapes), rows.unflatten(error, shapes), kept
    inner, dims = exchange.along(exchange.parts), exchange.dims
    row, error = _average_rows(codec, rows.to_rows(grads, dims, inner.devices), inner)
    if exchange.others:
        row, lost = _average_flat(codec, row, exchange.along(exchange.others))
        error = _add_own(error, lost, inner)
    of_parts = rows.shapes_of_parts(shapes, dims, inner.devices)
    means = rows.from_rows(row[None], of_parts, dims)
    return means, rows.from_rows(error, shapes, dims), kept


def _average_flat(codec: Codec, flat: jax.Array, exchange: Exchange) -> tuple[jax.Array, jax.Array]:
    """Return the mean of flat arrays on every device, and this device's errors."""
    row, error = _average_rows(codec, pad_to_blocks(flat, exchange.devices), exchange)
    # Without the barrier XLA may gather what is not encoded yet.
    message = lax.optimization_barrier(codec.encode(row[None]))
    lost = row - codec.decode(message, row.size, row.dtype)[0]
    gathered = all_gather(message, exchange.axes, invariant=True, name=exchange.name)
    mean = codec.decode(lax.optimization_barrier(gathered), row.size, row.dtype)
    error = _add_own(error, lost, exchange)
    return mean.reshape(-1)[: flat.size], error.reshape(-1)[: flat.size]


def _average_rows(codec: Codec, own: jax.Array, exchange: Exchange) -> tuple[jax.Array, jax.Array]:
    """Return the mean of this device's row, and its errors in the rows of all."""
    message = lax.optimization_barrier(codec.encode(own))
    error = own - codec.decode(message, own.shape[1], own.dtype)
    arrived = all_to_all(message, exchange.axes, split_dim=0, concat_dim=0, name=exchange.name)
    values = codec.decode(lax.optimization_barrier(arrived), own.shape[1], own.dtype)
    return values.mean(0), error


def _add_own(error: jax.Array, lost: jax.Array, exchange: Exchange) -> jax.Array:
    """Add what the mean of this device's row has lost, as many times as it will be divided."""
    error, lost = varying.match_varying(error, lost)
    return error.at[axis_index(exchange.axes)].add(exchange.devices * lost)


def _predict_sends(
    codec: Codec, shapes: list[jax.ShapeDtypeStruct], exchange: Exchange
) -> list[Predicted]:
    elements = sum(x.size for x in shapes)
    if not exchange.parts:
        return _sends_flat(codec, elements, exchange)
    inner = exchange.along(exchange.parts)
    width = elements // inner.devices
    sent = [inner.predict("all-to-all", codec.dtype, inner.devices * codec.length(width))]
    if exchange.others:
        sent += _sends_flat(codec, width, exchange.along(exchange.others))
    return sent


def _sends_flat(codec: Codec, elements: int, exchange: Exchange) -> list[Predicted]:
    length = exchange.devices * codec.length(-(-elements // exchange.devices))
    return [exchange.predict(kind, codec.dtype, length) for kind in ("all-to-all", "all-gather")]
