"""What the exchange of gradients sends, bucket by bucket."""

import math
from dataclasses import replace
from typing import Any

import jax

from txcore.layout import Layout
from txcore.mesh import MeshSpec
from txcore.parallel.gradients.algorithms import Algorithm
from txcore.parallel.gradients.buckets import Bucket, as_buckets
from txcore.parallel.gradients.choice import plan_exchange, predict_bucket
from txcore.parallel.gradients.compression import as_compression
from txcore.parallel.predicted import Predicted
from txcore.plan.data_parallel import DP
from txcore.plan.predict import predict_gradients
from txcore.plan.predict_shards import predict_shards


def predict_exchange(shapes: Any, layouts: Any, mesh: MeshSpec, dp: DP | None) -> list[Predicted]:
    """Predict the mean of gradients, and the exchange of the parameters whose state is sharded.

    Args:
      shapes: of the parameters, each of them whole.
      layouts: pytree of `Layout` like them.
      mesh: the devices and their axes.
      dp: the plan's data parallelism.

    Returns:
      What the algorithms send of each bucket. Of what is in no bucket one all-reduce for each dtype
      and axes, or a reduce-scatter.
    """
    chosen = choose_exchange(shapes, layouts, mesh, dp)
    sent = [line for pair in chosen for line in predict_bucket(*pair, mesh.shape)]
    bucketed = {place for bucket, _ in chosen for place in bucket.leaves}
    pairs = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(layouts), strict=True))
    inside = [pair for i, pair in enumerate(pairs) if i in bucketed]
    outside = [pair for i, pair in enumerate(pairs) if i not in bucketed]
    compression = as_compression("DP", dp.compression if dp is not None else None)
    sent += predict_gradients(outside, mesh, compression)
    sent += predict_shards(outside, mesh, dp)
    sent += [line for line in predict_shards(inside, mesh, dp) if line.what != "gradients"]
    return _merge(sent)


def choose_exchange(
    shapes: Any, layouts: Any, mesh: MeshSpec, dp: DP | None
) -> list[tuple[Bucket, Algorithm]]:
    """Return the buckets of parameters' gradients, and the algorithm of each."""
    if dp is None or dp.reduction != "mean" or dp.sync_every > 1 or dp.compression is not None:
        return []
    platform = mesh.mesh.devices.flat[0].platform
    return plan_exchange(
        jax.tree.map(lambda leaf, layout: _local(leaf, layout, mesh), shapes, layouts),
        layouts,
        sizes=mesh.shape,
        platform=platform if platform in ("cpu", "tpu") else "gpu",
        buckets=as_buckets("DP", dp.buckets),
        algorithm=dp.algorithm,
    )


def _local(leaf: Any, layout: Layout, mesh: MeshSpec) -> jax.ShapeDtypeStruct:
    """Return a flat gradient of one device's size, before its exchange."""
    parts = [mesh.shape[axis] for axis in layout.norm_axes if axis not in layout.reduced]
    return jax.ShapeDtypeStruct((leaf.size // math.prod(parts),), leaf.dtype)


def _merge(lines: list[Predicted]) -> list[Predicted]:
    """Return one line for all arrays that are said of alike."""
    merged: dict[Predicted, tuple[int, ...]] = {}
    for line in lines:
        key = replace(line, elements=())
        merged[key] = (*merged.get(key, ()), *line.elements)
    return [replace(key, elements=elements) for key, elements in merged.items()]
