"""The mean of the devices' gradients, whole or in shards."""

from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from txcore import _compat
from txcore.collectives import _leaves, pmean, reduce_scatter
from txcore.layout import Layout
from txcore.parallel.gradients.adasum import adasum
from txcore.parallel.gradients.compression import Compression, as_compression
from txcore.parallel.gradients.compression.leaves import average_leaves
from txcore.parallel.gradients.delayed import take_delayed


def sync_gradients(
    grads: Any,
    axis: str | tuple[str, ...],
    *,
    layouts: Any = None,
    reduction: str = "mean",
    delay: int = 0,
    compression: Compression | str | None = None,
    comm_state: Any = None,
    name: str = "grads",
) -> tuple[Any, Any]:
    """Average gradients over the data axes: one all-reduce for each leaf, which XLA combines.

    With `delay=1` it is those of the call before that are averaged, and returned.

    Equation: `pmean(grads, axis)`, or `adasum`; of a leaf that its layout splits over some of the
    axes, `pmean(reduce_scatter(grads, those, mean=True), the others)`.

    Args:
      grads: pytree of gradients, local to each device.
      axis: the data axes.
      layouts: pytree of `txcore.layout.Layout` like `grads` (`plan.layouts(params, mesh)`); None
        where each device is to have the whole mean.
      reduction: "mean", or "adasum" (`txcore.parallel.gradients.adasum`).
      delay: 1 to keep these gradients in `comm_state["delayed"]` for the next call, each with a dim
        of 1 in front, and to average those that it holds: zeros at first.
      comm_state: what the call before returned; None for a plain mean.
      compression: how they are averaged with fewer bytes: "bf16", "fp16", "int8" or what a
        function of `tx.compression` returns. None: exactly.
      comm_state: what a compression keeps from step to step, first of `tx.compression.start`.
      name: label of the operations' tags.

    Returns:
      The averaged gradients and the new `comm_state`.

    Raises:
      ValueError: `compression` is another name, or `comm_state` is not that of these gradients.
      ValueError, TypeError, NameError: as `pmean`.

    Example:
      >>> def f(g):
      ...     return tx.sync_gradients({"w": g}, "data")[0]["w"]
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 4}, out_specs=P())
      array([1.5], dtype=float32)
    """
    if delay:
        grads, comm_state = take_delayed(grads, comm_state)
    if reduction == "adasum":
        return (adasum(grads, axis, name=name) if axis else grads), comm_state
    if layouts is None:
        axes = _leaves.check_axes("sync_gradients", axis)
        layouts = jax.tree.map(partial(_layout_by_type, axes), grads)
    treedef: Any = jax.tree.structure(layouts)
    leaves = treedef.flatten_up_to(grads)
    how: list[Any] = [(one.reduced, one.scattered) for one in jax.tree.leaves(layouts)]
    if (record := as_compression("sync_gradients", compression)) is not None:
        means, comm_state = average_leaves(record, grads, layouts, comm_state, name)
        leaves = [means.get(i, leaf) for i, leaf in enumerate(leaves)]
        how = [None if i in means else key for i, key in enumerate(how)]
    for key in dict.fromkeys(key for key in how if key is not None and key[0]):
        chosen = [leaf if own == key else None for leaf, own in zip(leaves, how, strict=True)]
        done = treedef.flatten_up_to(_average(treedef.unflatten(chosen), *key, name=name))
        leaves = [d if own == key else x for d, x, own in zip(done, leaves, how, strict=True)]
    return treedef.unflatten(leaves), comm_state


def _layout_by_type(axes: tuple[str, ...], grad: Any) -> Layout:
    """Return a layout that names the axes along which jax's type says that a gradient varies."""
    others = sorted(_compat.varying_axes(grad) - {*axes})
    return Layout(P(), P(tuple(others)), axes)


def _average(
    tree: Any, axes: tuple[str, ...], scattered: tuple[int, tuple[str, ...]] | None, *, name: str
) -> Any:
    """Average leaves that are laid out alike: None stands for the others."""
    if scattered is not None:
        dim, parts = scattered
        tree = reduce_scatter(tree, parts, dim=dim, mean=True, name=name)
        axes = tuple(axis for axis in axes if axis not in parts)
    return pmean(tree, axes, name=name) if axes else tree
