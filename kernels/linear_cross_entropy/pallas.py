"""The fused linear layer and loss in Pallas kernels, which never write the logits to memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from txcore.kernels.common import checks, mosaic_blocks, pallas_tiles
from txcore.kernels.cross_entropy import online, pallas
from txcore.kernels.cross_entropy.blocks import Cut, LossTiles
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.linear_cross_entropy import xla

Residuals = tuple[xla.Operands, online.Normalizer]


def explain_refusal_on_tpu(problem: Problem) -> str | None:
    """Return why the kernels cannot compute a problem on a TPU, or None."""
    tile = LossTiles(256, 512)
    size = (tile.rows + tile.classes) * problem.shapes[1][0]
    size *= jnp.dtype(problem.dtypes[0]).itemsize
    return mosaic_blocks.explain_refusal(problem) or mosaic_blocks.explain_too_wide(size)


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
    losses = _linear_cross_entropy(rows, w, b, indices, factors, config, label_smoothing)
    return losses.reshape(labels.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _linear_cross_entropy(
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
    known = pallas.compute_stats(_source_of(x, w, b, factors, config), labels, smoothing)
    loss, normalizer = online.compute_losses(known, labels, w.shape[1], smoothing)
    return loss, ((x, w, b, labels), normalizer)


# The gradient of each block's logits is written to memory, since two products read all of it:
# w's gradient sums over its rows, and x's over its classes.
def _backward(
    factors: jnp.dtype, config: LossTiles, smoothing: float, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    (x, w, b, labels), normalizer = residuals
    cut = Cut.into_even_blocks(w.shape[1], config.block)

    def gradient_of(index: jax.Array | int) -> jax.Array:
        source = _source_of(
            x, cut.slice_block(w, index), cut.slice_block(b, index), factors, config
        )
        inside = labels - cut.start_of(index).astype(labels.dtype)
        return pallas.compute_gradient(
            source, inside, normalizer, g, cut.length, smoothing, factors
        )

    return (*xla.compute_gradients(gradient_of, x, w, b, factors, cut), None)


_linear_cross_entropy.defvjp(_forward, _backward)


def _source_of(
    x: jax.Array, w: jax.Array, b: jax.Array, factors: jnp.dtype, config: LossTiles
) -> pallas.Source:

    (count, features), classes = x.shape, w.shape[1]
    rows = pallas_tiles.block_size(count, config.rows)
    columns = pallas_tiles.block_size(classes, config.classes)
    inner = pallas_tiles.block_size(features, config.features)
    x, w = pallas_tiles.pad_to_blocks(x, rows, inner), pallas_tiles.pad_to_blocks(w, inner, columns)
    dtype = checks.accumulator(x.dtype)

    def read_scores(x_ref: Any, w_ref: Any, b_ref: Any) -> jax.Array:
        def add_product(step: Any, total: jax.Array) -> jax.Array:
            where = pallas_tiles.slice_block(step, inner)
            left, right = x_ref[:, where].astype(factors), w_ref[where, :].astype(factors)
            # HIGHEST, since a GPU would otherwise round float32 factors to the 10 bits of TF32.
            precision = jax.lax.Precision.HIGHEST if factors == dtype else None
            return total + jnp.dot(left, right, precision=precision, preferred_element_type=dtype)

        scores = jax.lax.fori_loop(
            0, x.shape[1] // inner, add_product, jnp.zeros((rows, columns), dtype)
        )
        return scores + b_ref[...].astype(dtype)

    operands = [
        (x, ((rows, x.shape[1]), lambda i, j: (i, 0))),
        (w, ((w.shape[0], columns), lambda i, j: (0, j))),
        (pallas_tiles.pad_to_blocks(b[None], 1, columns), pallas_tiles.row_spec(columns)),
    ]
    return pallas.Source((count, classes), (rows, columns), operands, read_scores, config.warps)
