"""The mean of the devices' gradients, whole or in shards."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from txcore import _compat
from txcore.collectives import _leaves, pmean, reduce_scatter
from txcore.collectives._leaves import Leaf
from txcore.kernels import pack, unpack
from txcore.kernels.dispatch.registry import current_device
from txcore.layout import Layout
from txcore.parallel.gradients.adasum import adasum
from txcore.parallel.gradients.algorithms import Algorithm, Name, mean_blocks, mean_flat
from txcore.parallel.gradients.apart import keep_apart
from txcore.parallel.gradients.buckets import (
    Bucket,
    Buckets,
    as_buckets,
    whole_before,
)
from txcore.parallel.gradients.choice import (
    check_algorithm,
    check_not_compressed,
    plan_exchange,
    split_steps,
)
from txcore.parallel.gradients.compression import Compression, as_compression, rows
from txcore.parallel.gradients.compression.leaves import average_leaves
from txcore.parallel.gradients.delayed import take_delayed
from txcore.parallel.lone_axes import make_equal_along_lone_axes
from txcore.step_scope import current_scope


def sync_gradients(
    grads: Any,
    axis: str | tuple[str, ...],
    *,
    layouts: Any = None,
    reduction: str = "mean",
    delay: int = 0,
    buckets: Buckets | float | None = None,
    algorithm: Name | None = None,
    compression: Compression | str | None = None,
    comm_state: Any = None,
    name: str = "grads",
) -> tuple[Any, Any]:
    """Average gradients over the data axes: in which pieces, and by which algorithm.

    Equation: `pmean(grads, axis)`, or `adasum`; of a leaf that its layout splits over some of the
    axes, `pmean(reduce_scatter(grads, those, mean=True), the others)`. Transpose: that of these,
    whatever the algorithm; of `adasum` and of a compression there is none.

    Args:
      grads: pytree of gradients, local to each device.
      axis: the data axes.
      layouts: pytree of `txcore.layout.Layout` like `grads` (`plan.layouts(params, mesh)`); None
        where each device is to have the whole mean.
      reduction: "mean", or "adasum" (`txcore.parallel.gradients.adasum`).
      delay: 1 to keep these gradients in `comm_state["delayed"]` for the next call, each with a dim
        of 1 in front, and to average those that it holds: zeros at first.
      buckets: MiB of the pieces in which they are exchanged, or `tx.Buckets(mb, first_mb)`; XLA
        combines no two of them. None: XLA combines all that plain all-reduces exchange.
      algorithm: "plain" (one all-reduce, or a reduce-scatter), "chunked" (the same in pieces of
        4 MiB), "reduce_scatter_all_gather", "ring" (by `ppermute`), "recursive_doubling" (the
        same, for few devices), "hierarchical" (the last axis first) or "bf16_wire" (bfloat16 is
        sent, float32 is summed). None: the fastest known for the size, the axes and the backend.
      compression: how they are averaged with fewer bytes: "bf16", "fp16", "int8" or what a
        function of `tx.compression` returns. None: exactly.
      comm_state: what the call before returned, and at first `tx.compression.start` or the zeros
        of a delay; None where nothing is kept.
      name: label of the operations' tags.

    Returns:
      The averaged gradients and the new `comm_state`.

    Raises:
      ValueError: `reduction`, `compression` or `algorithm` is another name, two of them are given,
        the algorithm needs other axes, or `comm_state` is not that of these gradients.
      ValueError, TypeError, NameError: as `pmean`.

    Example:
      >>> def f(g):
      ...     return tx.sync_gradients({"w": g}, "data", algorithm="ring")[0]["w"]
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 4}, out_specs=P())
      array([1.5], dtype=float32)
    """
    buckets = as_buckets("tx.sync_gradients", buckets)
    # A step's plan has checked its own axes, of which the engine leaves out those of one device.
    given = None if current_scope() is not None else _leaves.check_axes("sync_gradients", axis)
    check_algorithm("tx.sync_gradients", algorithm, given)
    check_not_compressed("tx.sync_gradients", algorithm, compression)
    if delay:
        grads, comm_state = take_delayed(grads, comm_state)
    if reduction != "mean":
        _check_adasum(reduction, {"buckets": buckets, "compression": compression}, algorithm)
        return (adasum(grads, axis, name=name) if axis else grads), comm_state
    if layouts is None:
        axes = _leaves.check_axes("sync_gradients", axis)
        layouts = jax.tree.map(partial(_layout_by_type, axes), grads)
    treedef: Any = jax.tree.structure(layouts)
    leaves = treedef.flatten_up_to(grads)
    means: dict[int, jax.Array] = {}
    how: list[Any] = [(one.reduced, one.scattered) for one in jax.tree.leaves(layouts)]
    if (record := as_compression("sync_gradients", compression)) is not None:
        means, comm_state = average_leaves(
            record, grads, layouts, comm_state, name, buckets=buckets, axes=_as_tuple(axis)
        )
    elif buckets is not None or algorithm != "plain":
        means = _average_buckets(grads, layouts, buckets, algorithm, name, _as_tuple(axis))
    leaves = [means.get(i, leaf) for i, leaf in enumerate(leaves)]
    how = [None if i in means else key for i, key in enumerate(how)]
    for key in dict.fromkeys(key for key in how if key is not None and key[0]):
        chosen = [leaf if own == key else None for leaf, own in zip(leaves, how, strict=True)]
        done = treedef.flatten_up_to(_average_alike(treedef.unflatten(chosen), *key, name=name))
        leaves = [d if own == key else x for d, x, own in zip(done, leaves, how, strict=True)]
    return treedef.unflatten(leaves), comm_state


def _as_tuple(axis: str | tuple[str, ...]) -> tuple[str, ...]:
    return axis if isinstance(axis, tuple) else (axis,)


def _check_adasum(reduction: str, others: dict[str, Any], algorithm: Name | None) -> None:
    if reduction != "adasum":
        raise ValueError(
            f"tx.sync_gradients needs reduction= 'mean' or 'adasum', got {reduction!r}"
        )
    given = [f"{name}={value!r}" for name, value in others.items() if value is not None]
    if algorithm not in (None, "plain"):
        given.append(f"algorithm={algorithm!r}")
    if given:
        raise ValueError(
            "tx.sync_gradients needs reduction='mean' for another exchange than its own, got "
            f"reduction='adasum' with {', '.join(given)}: leave one of them out"
        )


def _layout_by_type(axes: tuple[str, ...], grad: Any) -> Layout:
    """Return a layout that names the axes along which jax's type says that a gradient varies."""
    others = sorted(_compat.varying_axes(grad) - {*axes})
    return Layout(P(), P(tuple(others)), axes)


def _average_alike(
    tree: Any, axes: tuple[str, ...], scattered: tuple[int, tuple[str, ...]] | None, *, name: str
) -> Any:
    """Average leaves that are laid out alike: None stands for the others."""
    if scattered is not None:
        dim, parts = scattered
        tree = reduce_scatter(tree, parts, dim=dim, mean=True, name=name)
        axes = tuple(axis for axis in axes if axis not in parts)
    return pmean(tree, axes, name=name) if axes else tree


def _average_buckets(
    grads: Any,
    layouts: Any,
    buckets: Buckets | None,
    algorithm: Name | None,
    name: str,
    axes: tuple[str, ...],
) -> dict[int, jax.Array]:
    """Average the leaves that are in buckets; return them by their places."""
    treedef: Any = jax.tree.structure(layouts)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(grads)[0]]
    leaves = [jnp.asarray(leaf) for leaf in treedef.flatten_up_to(grads)]
    laid: list[Layout] = [_without_axes_of_one(layout) for layout in jax.tree.leaves(layouts)]
    whole = [whole_before(leaf, layout, axes) for leaf, layout in zip(leaves, laid, strict=True)]
    sizes = {axis: _leaves.axes_size((axis,)) for _, one in whole for axis in one.reduced}
    planned = plan_exchange(
        jax.tree.unflatten(jax.tree.structure(grads), [leaf for leaf, _ in whole]),
        treedef.unflatten([layout for _, layout in whole]),
        sizes=sizes,
        platform=current_device()[0],
        buckets=buckets,
        algorithm=algorithm,
    )
    pairs = [(_left_of(bucket, laid[bucket.leaves[0]]), by) for bucket, by in planned]
    chosen = [(bucket, by) for bucket, by in pairs if bucket.axes]
    packed: list[jax.Array] = []
    jobs: list[Callable[[jax.Array], jax.Array]] = []
    for i, (bucket, by) in enumerate(chosen):
        for place in bucket.leaves:
            where = name + jax.tree_util.keystr(paths[place])
            given_leaf = Leaf(leaves[place], where)
            leaves[place] = _leaves.check_local("sync_gradients", given_leaf, laid[place].reduced)
        packed.append(_pack_bucket(bucket, leaves, laid, sizes))
        jobs.append(partial(_mean_of_bucket, bucket, by, sizes, f"{name}/{i}"))
    means = keep_apart(jobs, packed, name)
    done: dict[int, jax.Array] = {}
    given = jax.tree.leaves(layouts)
    for (bucket, _), mean in zip(chosen, means, strict=True):
        parts = _unpack_bucket(bucket, mean, leaves, laid, sizes)
        for place, leaf in zip(bucket.leaves, parts, strict=True):
            done[place] = make_equal_along_lone_axes(leaf, given[place].reduced, name)
    return done


def _left_of(bucket: Bucket, layout: Layout) -> Bucket:
    """Return a bucket of what is left to reduce: all of it, or the others' mean of a part."""
    return (
        bucket
        if bucket.axes == layout.reduced
        else replace(bucket, axes=layout.reduced, scattered=())
    )


def _without_axes_of_one(layout: Layout) -> Layout:
    reduced = tuple(axis for axis in layout.reduced if _leaves.axes_size((axis,)) > 1)
    return replace(layout, reduced=reduced)


def _pack_bucket(
    bucket: Bucket, leaves: Sequence[jax.Array], laid: Sequence[Layout], sizes: dict[str, int]
) -> jax.Array:
    """Return a bucket's leaves as (n,), or as (devices, n / devices) where they are scattered."""
    if not bucket.scattered:
        return pack([leaves[i] for i in bucket.leaves], dtype=bucket.dtype)
    own = [leaves[i].astype(bucket.dtype) for i in bucket.leaves]
    return rows.to_rows(own, _dims_of(bucket, laid), _count_devices(bucket, sizes))


def _unpack_bucket(
    bucket: Bucket,
    mean: jax.Array,
    leaves: Sequence[jax.Array],
    laid: Sequence[Layout],
    sizes: dict[str, int],
) -> list[jax.Array]:
    own = [leaves[i] for i in bucket.leaves]
    if not bucket.scattered:
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in own]
        return list(unpack(mean, shapes))
    dims, devices = _dims_of(bucket, laid), _count_devices(bucket, sizes)
    of_parts = rows.shapes_of_parts([leaf.shape for leaf in own], dims, devices)
    parts = rows.from_rows(mean[None], of_parts, dims)
    return [part.astype(leaf.dtype) for part, leaf in zip(parts, own, strict=True)]


def _count_devices(bucket: Bucket, sizes: dict[str, int]) -> int:
    return math.prod(sizes[axis] for axis in bucket.scattered)


def _dims_of(bucket: Bucket, laid: Sequence[Layout]) -> list[int]:
    """Return the dim of each leaf that is scattered."""
    found = [laid[i].scattered for i in bucket.leaves]
    return [split[0] for split in found if split is not None]


def _mean_of_bucket(
    bucket: Bucket, algorithm: Algorithm, sizes: dict[str, int], name: str, packed: jax.Array
) -> jax.Array:
    for step in split_steps(bucket, sizes):
        average = mean_blocks if packed.ndim > 1 else mean_flat
        packed = average(algorithm, packed, tuple(step), name)
    return packed
