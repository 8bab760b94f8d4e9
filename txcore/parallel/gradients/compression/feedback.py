"""What all compressions have in common: what is left over, the first steps, and shards."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from txcore import varying
from txcore.collectives import pmean, reduce_scatter
from txcore.kept import Kept, as_copy, own_copy, specs_of, start_all
from txcore.kernels.common import checks
from txcore.layout import Layout, drop_axes
from txcore.parallel.gradients.buckets import Buckets, bucket_layout
from txcore.parallel.gradients.compression.named import as_compression
from txcore.parallel.gradients.compression.record import Compression, Exchange
from txcore.parallel.parts import take_part
from txcore.parallel.predicted import Predicted

KEY = "compression"  # of what is kept, in comm_state


def is_compressed(leaf: Any) -> bool:
    """Tell whether gradients like a leaf are compressed: real floating point, and not empty."""
    return bool(leaf.size) and jnp.issubdtype(leaf.dtype, jnp.floating)


def group_of(layout: Layout, dtype: Any) -> tuple[Any, ...]:
    """Return what leaves have in common that are averaged together.

    Returns:
      The axes over which they are averaged, those along which each device gets its part, the
      other axes over which they are split, and the dtype. One flat array of leaves that are equal
      along an axis and others that are not would vary along it.
    """
    split = tuple(axis for axis in layout.norm_axes if axis not in layout.reduced)
    parts = layout.scattered[1] if layout.scattered is not None else ()
    return layout.reduced, parts, split, jnp.dtype(dtype)


def group_leaves(
    leaves: Sequence[Any], laid: Sequence[Layout], buckets: Buckets | None
) -> list[list[int]]:
    """Return the places of the leaves that are averaged together: those of a bucket, else all.

    Args:
      leaves: gradients of one device, arrays or shapes.
      laid: the layout of each.
      buckets: their sizes; None where all leaves that are laid out alike are averaged together.
    """
    groups: list[list[int]] = []
    if buckets is not None:
        groups = [[*bucket.leaves] for bucket in bucket_layout([*leaves], [*laid], buckets)]
    taken = {place for group in groups for place in group}
    others: dict[Any, list[int]] = {}
    for place, (leaf, layout) in enumerate(zip(leaves, laid, strict=True)):
        if is_compressed(leaf) and place not in taken:
            others.setdefault(group_of(layout, leaf.dtype), []).append(place)
    return groups + list(others.values())


def exchange_of(laid: Sequence[Layout], sizes: Mapping[str, int], name: str = "grads") -> Exchange:
    """Return the exchange of leaves of one group, by their layouts and the sizes of the axes."""
    more = {axis: sizes[axis] for axis in laid[0].reduced if sizes[axis] > 1}
    found = [one.scattered for one in laid if one.scattered is not None]
    parts = tuple(axis for axis in found[0][1] if axis in more) if found else ()
    return Exchange(more, name, parts, tuple(dim for dim, _ in found) if parts else ())


def average_compressed(
    compression: Compression,
    grads: list[jax.Array],
    errors: list[Any],
    kept: list[Any],
    steps: jax.Array | None,
    exchange: Exchange,
) -> tuple[list[jax.Array], list[Any], list[Any]]:
    """Average gradients of one dtype together.

    Args:
      compression: how.
      grads: local gradients, at least one.
      errors: what is left over of each, as a copy (`as_copy`); None where nothing is kept.
      kept: what the compression keeps of each.
      steps: how many were made before this one; None where the compression begins at once.
      exchange: between which devices; over one device the mean is what it has.

    Returns:
      The means in the dtype of the gradients, the errors and what is kept for the next step.
    """
    wide = checks.accumulator(grads[0].dtype)
    full = [g.astype(wide) for g in grads]
    if compression.feedback:
        full = [g + own_copy(e).astype(wide) for g, e in zip(full, errors, strict=True)]
    means, left, kept = _average_pending(compression, full, kept, steps, exchange)
    means = [mean.astype(g.dtype) for mean, g in zip(means, grads, strict=True)]
    if compression.feedback:
        pairs = zip(left, errors, strict=True)
        errors = [as_copy(new).astype(before.dtype) for new, before in pairs]
    return means, errors, kept


def _average_pending(
    compression: Compression,
    full: list[jax.Array],
    kept: list[Any],
    steps: jax.Array | None,
    exchange: Exchange,
) -> tuple[list[jax.Array], list[jax.Array], list[Any]]:
    def plain(full: list[jax.Array], kept: list[Any]) -> Any:
        zeros = [varying.match_varying(jnp.zeros_like(g), g)[0] for g in full]
        means = full if exchange.devices == 1 else _average_plainly(full, exchange)
        return means, zeros, kept

    def compressed(full: list[jax.Array], kept: list[Any]) -> Any:
        if compression.scatters or not exchange.parts:
            means, left, new = compression.average(full, kept, exchange)
        else:
            means, left, new = compression.average(full, kept, exchange.along(exchange.axes))
            means = _own_parts(means, exchange)
        return [_claim_mean(mean, exchange) for mean in means], left, new

    if exchange.devices == 1:
        return plain(full, kept)
    if steps is None:
        return compressed(full, kept)
    return lax.cond(steps < compression.start, plain, compressed, full, kept)


def _claim_mean(mean: jax.Array, exchange: Exchange) -> jax.Array:
    """Claim what a compression has made: along each axis a part of the mean, or all of it."""
    if exchange.parts:
        mean = varying.claim(mean, varying.MEAN_SHARD, exchange.parts)
    return varying.claim(mean, varying.MEAN, exchange.others) if exchange.others else mean


def _average_plainly(grads: list[jax.Array], exchange: Exchange) -> list[jax.Array]:
    if exchange.parts:
        grads = [
            reduce_scatter(g, exchange.parts, dim=dim, mean=True, name=exchange.name)
            for g, dim in zip(grads, exchange.dims, strict=True)
        ]
    return pmean(grads, exchange.others, name=exchange.name) if exchange.others else grads


def _own_parts(means: list[jax.Array], exchange: Exchange) -> list[jax.Array]:
    pairs = zip(means, exchange.dims, strict=True)
    return [take_part(mean, (dim, exchange.parts)) for mean, dim in pairs]


def predict_compressed(
    compression: Compression, shapes: list[jax.ShapeDtypeStruct], exchange: Exchange
) -> list[Predicted]:
    """Predict what `average_compressed` sends of gradients of one dtype, shapes of one device."""
    wide = checks.accumulator(shapes[0].dtype)
    shapes = [jax.ShapeDtypeStruct(x.shape, wide) for x in shapes]
    plain = []
    if compression.start:
        sizes = [x.size for x in shapes]
        plain = _predict_plainly(sizes, wide.name, exchange)
    if not compression.scatters:
        exchange = exchange.along(exchange.axes)
    return plain + compression.sends(shapes, exchange)


def _predict_plainly(sizes: list[int], dtype: str, exchange: Exchange) -> list[Predicted]:
    if not exchange.parts:
        return [exchange.predict("all-reduce", dtype, *sizes)]
    inner = exchange.along(exchange.parts)
    sent = [inner.predict("reduce-scatter", dtype, *sizes)]
    if exchange.others:
        parts = [size // inner.devices for size in sizes]
        sent.append(exchange.along(exchange.others).predict("all-reduce", dtype, *parts))
    return sent


def keep_compressed(
    compression: Compression,
    params: Any,
    layouts: Any,
    axes: tuple[str, ...],
    sizes: Mapping[str, int],
) -> dict[str, Any] | None:
    """Return what a compression keeps from step to step; None for nothing.

    Args:
      compression: how gradients are averaged.
      params: pytree of the parameters, arrays or shapes, each of them whole.
      layouts: pytree of `Layout` like them.
      axes: those over which gradients are averaged.
      sizes: of the mesh's axes.

    Returns:
      Pytrees of `Kept` like the parameters, with None for leaves of which nothing is kept:
      "errors", what each device's gradients still lack in the means; "own", what the compression
      itself keeps; and "steps", those before it begins.
    """
    if not compression.has_state:
        return None
    count = math.prod(sizes[axis] for axis in axes)

    def error_of(leaf: Any, layout: Layout) -> Kept | None:
        if not is_compressed(leaf):
            return None
        split = drop_axes(layout.gradient, frozenset(axes))
        dtype = checks.accumulator(leaf.dtype).name
        return Kept((count, *leaf.shape), dtype, drop_axes(P(axes, *split), frozenset()), axes)

    def own_of(leaf: Any, layout: Layout) -> Any:
        if not is_compressed(leaf) or compression.keeps is None:
            return None
        return compression.keeps(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), layout, sizes)

    def of_leaves(function: Callable[[Any, Layout], Any]) -> Any:
        return jax.tree.map(function, params, layouts)

    kept: dict[str, Any] = {}
    if compression.feedback:
        kept["errors"] = of_leaves(error_of)
    if compression.keeps is not None:
        kept["own"] = of_leaves(own_of)
    if compression.start:
        kept["steps"] = Kept((), "int32", P())
    return kept


def start(
    compression: Compression | str, params: Any, axis: str | tuple[str, ...], mesh: Any
) -> tuple[Any, Any]:
    """Return what a compression keeps, for the first call of `tx.sync_gradients` in a run.

    In an engine it is part of the state (`state.comm_state`).

    Args:
      compression: as `tx.sync_gradients` takes it.
      params: pytree like the gradients, arrays or shapes, whole on every device.
      axis: the data axes.
      mesh: a `tx.MeshSpec` or `jax.sharding.Mesh`.

    Returns:
      The `comm_state`, arrays on the mesh, and their PartitionSpecs, for the in_specs and out_specs
      of `jax.shard_map`. Both are None where nothing is kept.

    Raises:
      ValueError, TypeError: `compression` is none.

    Example:
      >>> params = {"w": np.zeros((4, 3), np.float32)}
      >>> mesh = tx.MeshSpec(jax.devices()[:2])
      >>> comm_state, specs = tx.compression.start("int8", params, "data", mesh)
      >>> comm_state["compression"]["errors"]["w"].shape, specs["compression"]["errors"]["w"][0]
      ((2, 4, 3), 'data')
    """
    record = as_compression("compression.start", compression)
    sizes = dict(mesh.shape)
    axes = axis if isinstance(axis, tuple) else (axis,)
    shapes = jax.eval_shape(lambda tree: tree, params)
    layouts = jax.tree.map(lambda _: Layout(P(), P(), axes), shapes)
    kept = None if record is None else keep_compressed(record, shapes, layouts, axes, sizes)
    tree = None if kept is None else {KEY: kept}
    place = partial(_place_array, getattr(mesh, "mesh", mesh))
    return jax.tree.map(place, start_all(tree), specs_of(tree)), specs_of(tree)


def _place_array(mesh: Mesh, host: np.ndarray, spec: P) -> jax.Array:
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
