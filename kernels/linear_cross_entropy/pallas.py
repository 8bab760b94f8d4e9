"""The fused linear layer and loss in Pallas kernels, which never write the logits to memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from txcore.kernels.common import checks, pallas_tiles
from txcore.kernels.cross_entropy import online, pallas
from txcore.kernels.cross_entropy.blocks import Cut, LossTiles
from txcore.kernels.linear_cross_entropy import xla

Residuals = tuple[xla.Operands, online.Normalizer]


def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    labels: jax.Array,
    *,
    config: LossTiles,
    label_smoothing: float,
) -> jax.Array:
    """Compute the op of `txcore.kernels.linear_cross_entropy` on checked operands."""
    rows, indices = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    factors = xla.factor_dtype(x.dtype)
    losses = _linear(rows, w, b, indices, factors, config, label_smoothing)
    return losses.reshape(labels.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _linear(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    labels: jax.Array,
    factors: jnp.dtype,
    config: LossTiles,
    smoothing: float,
) -> jax.Array:
    return _forward(x, w, b, labels, factors, config, smoothing)[0]


def _forward(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    labels: jax.Array,
    factors: jnp.dtype,
    config: LossTiles,
    smoothing: float,
) -> tuple[jax.Array, Residuals]:
    known = pallas.stats(_source(x, w, b, factors, config), labels, smoothing)
    loss, normalizer = online.losses(known, labels, w.shape[1], smoothing)
    return loss, ((x, w, b, labels), normalizer)


# Each block's gradient of the logits is written, since both products below read all of it: w's
# gradient along the rows, and x's along the classes.
def _backward(
    factors: jnp.dtype, config: LossTiles, smoothing: float, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    (x, w, b, labels), normalizer = residuals
    cut = Cut.evenly(w.shape[1], config.block)

    def change(index: jax.Array | int) -> jax.Array:
        source = _source(x, cut.slice(w, index), cut.slice(b, index), factors, config)
        inside = labels - cut.start(index).astype(labels.dtype)
        return pallas.gradient(source, inside, normalizer, g, cut.length, smoothing, factors)

    return (*xla.gradients(change, x, w, b, factors, cut), None)


_linear.defvjp(_forward, _backward)


def _source(
    x: jax.Array, w: jax.Array, b: jax.Array, factors: jnp.dtype, config: LossTiles
) -> pallas.Source:
    from jax.experimental import pallas as pl

    (count, features), classes = x.shape, w.shape[1]
    rows = pallas_tiles.block(count, config.rows)
    columns = pallas_tiles.block(classes, config.classes)
    inner = pallas_tiles.block(features, config.features)
    x, w = pallas_tiles.pad(x, rows, inner), pallas_tiles.pad(w, inner, columns)
    dtype = checks.accumulator(x.dtype)

    def read(x_ref: Any, w_ref: Any, b_ref: Any) -> jax.Array:
        def add(step: Any, total: jax.Array) -> jax.Array:
            where = pl.ds(step * inner, inner)
            left, right = x_ref[:, where].astype(factors), w_ref[where, :].astype(factors)
            # Full precision: a GPU would otherwise round float32 factors to ten bits.
            precision = jax.lax.Precision.HIGHEST if factors == dtype else None
            return total + jnp.dot(left, right, precision=precision, preferred_element_type=dtype)

        scores = jax.lax.fori_loop(0, x.shape[1] // inner, add, jnp.zeros((rows, columns), dtype))
        return scores + b_ref[...].astype(dtype)

    operands = [
        (x, ((rows, x.shape[1]), lambda i, j: (i, 0))),
        (w, ((w.shape[0], columns), lambda i, j: (0, j))),
        (pallas_tiles.pad(b[None], 1, columns), pallas_tiles.row(columns)),
    ]
    return pallas.Source((count, classes), (rows, columns), operands, read, config.warps)
