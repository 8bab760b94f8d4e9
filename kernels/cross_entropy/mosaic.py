"""The loss of logits in the Pallas kernels over tiles of scores, as TPUs run it."""

import jax

from txcore.kernels.common import checks, pallas_tiles
from txcore.kernels.cross_entropy import online, pallas
from txcore.kernels.cross_entropy.blocks import LossTiles
from txcore.kernels.cross_entropy.derivatives import make_cross_entropy


def _compute_stats(
    logits: jax.Array, labels: jax.Array, config: LossTiles, smoothing: float
) -> online.Stats:
    return pallas.compute_stats(_source_of(logits, config), labels, smoothing)


def _compute_gradient(
    logits: jax.Array,
    labels: jax.Array,
    normalizer: online.Normalizer,
    g: jax.Array,
    config: LossTiles,
    smoothing: float,
) -> jax.Array:
    classes, dtype = logits.shape[1], logits.dtype
    source = _source_of(logits, config)
    return pallas.compute_gradient(source, labels, normalizer, g, classes, smoothing, dtype)


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


cross_entropy = make_cross_entropy(_compute_stats, _compute_gradient)
