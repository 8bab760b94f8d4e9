"""How layers lie on the stages of a pipeline."""

from typing import Any

import jax
import numpy as np

from txcore.parallel.pipeline.schedule import Schedule


def split_layers(layers: Any, schedule: Schedule) -> Any:
    """Split stacked layers over the virtual stages of a pipeline, in order.

    Chunk c of stage s holds the layers of virtual stage c * p + s, for p stages. So the result,
    sharded by `P(None, axis)`, is what `params["blocks"]` needs, and
    `leaf.reshape(layers, ...)` is the way back.

    Args:
      layers: pytree of arrays, each (layers, ...).
      schedule: with v chunks a stage.

    Returns:
      The pytree, each leaf (v, p, layers / (v p), ...).

    Raises:
      ValueError: the number of layers is no multiple of v p.

    Example:
      >>> schedule = tx.pipeline.make_schedule("interleaved", stages=2, microbatches=4, chunks=2)
      >>> tx.pipeline.split_layers(np.arange(8), schedule).tolist()
      [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
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
        return leaf.reshape(chunks, stages, count // (stages * chunks), *np.shape(leaf)[1:])

    return jax.tree_util.tree_map_with_path(split_leaf, layers)
