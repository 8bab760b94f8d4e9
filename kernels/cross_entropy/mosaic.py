"""The loss of logits in the Pallas kernels over tiles of scores, as TPUs run it."""

from functools import partial

import jax

from txcore.kernels.common import checks, pallas_tiles
from txcore.kernels.cross_entropy import online, pallas
from txcore.kernels.cross_entropy.blocks import LossTiles

Residuals = tuple[jax.Array, jax.Array, online.Normalizer]


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, config: LossTiles, label_smoothing: float
) -> jax.Array:
    """Compute the op of `txcore.kernels.cross_entropy` on checked operands."""
    rows = logits.reshape(-1, logits.shape[-1])
    return _cross_entropy(rows, labels.reshape(-1), config, label_smoothing).reshape(labels.shape)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cross_entropy(
    logits: jax.Array, labels: jax.Array, config: LossTiles, smoothing: float
) -> jax.Array:
    return _forward(logits, labels, config, smoothing)[0]


def _forward(
    logits: jax.Array, labels: jax.Array, config: LossTiles, smoothing: float
) -> tuple[jax.Array, Residuals]:
    known = pallas.compute_stats(_source_of(logits, config), labels, smoothing)
    loss, normalizer = online.compute_losses(known, labels, logits.shape[1], smoothing)
    return loss, (logits, labels, normalizer)


def _backward(
    config: LossTiles, smoothing: float, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, None]:
    logits, labels, normalizer = residuals
    classes, dtype = logits.shape[1], logits.dtype
    source = _source_of(logits, config)
    out = pallas.compute_gradient(source, labels, normalizer, g, classes, smoothing, dtype)
    return out, None


_cross_entropy.defvjp(_forward, _backward)


def _source_of(logits: jax.Array, config: LossTiles) -> pallas.Source:
    count, classes = logits.shape
    rows = pallas_tiles.block_size(count, config.rows)
    columns = pallas_tiles.block_size(classes, config.classes)
    padded = pallas_tiles.pad_to_blocks(logits, rows, columns)
    tile: pallas_tiles.Spec = ((rows, columns), lambda i, j: (i, j))

    def read_scores(logits_ref: jax.Array) -> jax.Array:
        return logits_ref[...].astype(checks.accumulator(logits.dtype))

    return pallas.Source(
        (count, classes), (rows, columns), [(padded, tile)], read_scores, config.warps
    )
