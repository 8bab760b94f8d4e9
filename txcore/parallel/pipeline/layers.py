"""How layers lie on the stages of a pipeline."""

from typing import Any

import jax
import numpy as np

from txcore.parallel.pipeline.schedule import Schedule


def split_layers(layers: Any, schedule: Schedule) -> Any:
    """Return stacked layers as a pipeline stores them; refuse a number that does not fit.

    Chunk c of stage s holds the layers of virtual stage c * p + s, for p stages. With one chunk a
    stage the layers stay as they are, to be sharded by `P(axis)`; with several they are split into
    these, to be sharded by `P(None, axis)`. Either way they are in order, and
    `leaf.reshape(layers, ...)` is the way back.

    Args:
      layers: pytree of arrays, each (layers, ...).
      schedule: with v chunks a stage.

    Returns:
      The pytree; where v is above 1, with each leaf (v, layers / v, ...).

    Raises:
      ValueError: the number of layers is no multiple of v p.

    Example:
      >>> schedule = tx.pipeline.make_schedule("interleaved", stages=2, microbatches=4, chunks=2)
      >>> tx.pipeline.split_layers(np.arange(8), schedule).tolist()
      [[0, 1, 2, 3], [4, 5, 6, 7]]
    """
    stages, chunks = schedule.stages, schedule.chunks

    def split_leaf(path: Any, leaf: Any) -> Any:
        count = np.shape(leaf)[0] if np.ndim(leaf) else 0
        if not count or count % (stages * chunks):
            raise ValueError(
                f"tx.pipeline.split_layers needs a multiple of {stages * chunks} layers, {chunks} "
                f"chunks on each of {stages} stages, got shape {np.shape(leaf)} at "
                f"layers{jax.tree_util.keystr(path)}"
            )
        return split_chunks(leaf, chunks)

    return jax.tree_util.tree_map_with_path(split_leaf, layers)


def split_chunks(leaf: Any, chunks: int) -> Any:
    """Return stacked layers as (chunks, layers / chunks, ...); one chunk as it is."""
    if chunks == 1:
        return leaf
    return leaf.reshape(chunks, leaf.shape[0] // chunks, *leaf.shape[1:])
