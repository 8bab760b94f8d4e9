"""What the exchange of gradients sends, bucket by bucket."""

import math
from dataclasses import replace
from typing import Any

import jax

from txcore.layout import Layout, drop_axes, shape_of_part
from txcore.mesh import MeshSpec
from txcore.parallel.gradients.algorithms import Algorithm
from txcore.parallel.gradients.buckets import Bucket, as_buckets
from txcore.parallel.gradients.choice import plan_exchange, predict_bucket
from txcore.parallel.gradients.compression import Compression, as_compression
from txcore.parallel.gradients.compression.feedback import (
    exchange_of,
    group_leaves,
    is_compressed,
    predict_compressed,
)
from txcore.parallel.predicted import Predicted
from txcore.plan.data_parallel import DP
from txcore.plan.predict import predict_gradients
from txcore.plan.predict_shards import predict_shards

Pairs = list[tuple[Any, Layout]]


def predict_exchange(shapes: Any, layouts: Any, mesh: MeshSpec, dp: DP | None) -> list[Predicted]:
    """Predict the mean of gradients, and the exchange of the parameters whose state is sharded.

    Args:
      shapes: of the parameters, each of them whole.
      layouts: pytree of `Layout` like them.
      mesh: the devices and their axes.
      dp: the plan's data parallelism.

    Returns:
      What the algorithms send of each bucket, or what a compression does. Of what is in no bucket
      one all-reduce for each dtype and axes, or a reduce-scatter.
    """
    pairs = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(layouts), strict=True))
    chosen = choose_exchange(shapes, layouts, mesh, dp)
    early, together = _scatters_early(dp), dp is None or dp.shard != "parameters"
    sent: list[Predicted] = []
    for pair in chosen:
        sent += predict_bucket(*pair, mesh.shape, early=early, together=together)
    done = {place for bucket, _ in chosen for place in bucket.leaves}
    if dp is not None and (compression := as_compression("DP", dp.compression)) is not None:
        sent += _predict_compressed(compression, pairs, mesh, dp)
        done = {i for i, (leaf, _) in enumerate(pairs) if is_compressed(leaf)}
    inside = [pair for i, pair in enumerate(pairs) if i in done]
    outside = [pair for i, pair in enumerate(pairs) if i not in done]
    sent += predict_gradients(outside, mesh)
    sent += predict_shards(outside, mesh, dp)
    sent += [line for line in predict_shards(inside, mesh, dp) if line.what != "gradients"]
    return _merge_lines(sent)


def choose_exchange(
    shapes: Any, layouts: Any, mesh: MeshSpec, dp: DP | None
) -> list[tuple[Bucket, Algorithm]]:
    """Return the buckets of parameters' gradients, and the algorithm of each."""
    if dp is None or dp.reduction != "mean" or dp.sync_every > 1 or dp.compression is not None:
        return []
    platform = mesh.mesh.devices.flat[0].platform
    return plan_exchange(
        jax.tree.map(lambda leaf, layout: _flatten_local(leaf, layout, mesh), shapes, layouts),
        layouts,
        sizes=mesh.shape,
        platform=platform if platform in ("cpu", "tpu") else "gpu",
        buckets=as_buckets("DP", dp.buckets),
        algorithm=dp.algorithm,
    )


def _scatters_early(dp: DP | None) -> bool:
    """Tell whether a loop over microbatches scatters gradients in each trip."""
    return dp is not None and dp.shard in ("gradients", "parameters")


def _flatten_local(leaf: Any, layout: Layout, mesh: MeshSpec) -> jax.ShapeDtypeStruct:
    """Return a flat gradient of one device's size, before its exchange."""
    parts = [mesh.shape[axis] for axis in layout.norm_axes if axis not in layout.reduced]
    return jax.ShapeDtypeStruct((leaf.size // math.prod(parts),), leaf.dtype)


def _predict_compressed(
    compression: Compression, pairs: Pairs, mesh: MeshSpec, dp: DP
) -> list[Predicted]:
    """Predict what is sent of the leaves that are averaged together."""
    laid = [layout for _, layout in pairs]
    local = [
        shape_of_part(x.shape, drop_axes(one.gradient, frozenset(one.reduced)), mesh.shape)
        for x, one in pairs
    ]
    shapes = [jax.ShapeDtypeStruct(own, x.dtype) for own, (x, _) in zip(local, pairs, strict=True)]
    sent: list[Predicted] = []
    for places in group_leaves(shapes, laid, as_buckets("DP", dp.buckets)):
        exchange = exchange_of([laid[i] for i in places], mesh.shape)
        own = [shapes[i] for i in places]
        if exchange.parts and _scatters_early(dp):
            # Each parameter that is gathered scatters its gradient by itself.
            each = [[i] for i in places] if dp.shard == "parameters" else [places]
            for group in each:
                first = exchange_of([_first_step(laid[i]) for i in group], mesh.shape)
                lines = predict_compressed(compression, [shapes[i] for i in group], first)
                sent += [replace(line, per_microbatch=True) for line in lines]
            own = [_part_of(shapes[i], laid[i], mesh) for i in places]
            exchange = exchange.along(exchange.others)
        if exchange.axes:
            sent += predict_compressed(compression, own, exchange)
    return sent


def _first_step(layout: Layout) -> Layout:
    assert layout.scattered is not None
    return replace(layout, reduced=layout.scattered[1])


def _part_of(shape: Any, layout: Layout, mesh: MeshSpec) -> jax.ShapeDtypeStruct:
    assert layout.scattered is not None
    devices = math.prod(mesh.shape[axis] for axis in layout.scattered[1])
    return jax.ShapeDtypeStruct((shape.size // devices,), shape.dtype)


def _merge_lines(lines: list[Predicted]) -> list[Predicted]:
    """Return one line for all arrays that are said of alike.

    Where a loop sends some of them in each trip, the audit could not tell which: it does not count
    the trips of any.
    """
    merged: dict[Predicted, Predicted] = {}
    for line in lines:
        key = replace(line, elements=(), per_microbatch=False)
        before = merged.get(key, key)
        elements = (*before.elements, *line.elements)
        early = before.per_microbatch or line.per_microbatch
        merged[key] = replace(key, elements=elements, per_microbatch=early)
    return list(merged.values())
