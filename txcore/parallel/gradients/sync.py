"""The mean of the devices' gradients, whole or in shards."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from txcore.collectives import _leaves, pmean, reduce_scatter
from txcore.layout import Layout
from txcore.parallel.gradients.adasum import adasum
from txcore.parallel.gradients.delayed import take_delayed


def sync_gradients(
    grads: Any,
    axis: str | tuple[str, ...],
    *,
    layouts: Any = None,
    reduction: str = "mean",
    delay: int = 0,
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
      name: label of the operations' tags.

    Returns:
      The averaged gradients and the new `comm_state`.

    Raises:
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
        layouts = jax.tree.map(lambda _: Layout(P(), P(), axes), grads)
    treedef: Any = jax.tree.structure(layouts)
    leaves = treedef.flatten_up_to(grads)
    how = [(layout.reduced, layout.scattered) for layout in jax.tree.leaves(layouts)]
    for key in dict.fromkeys(key for key in how if key[0]):
        chosen = [leaf if own == key else None for leaf, own in zip(leaves, how, strict=True)]
        done = treedef.flatten_up_to(_average(treedef.unflatten(chosen), *key, name))
        leaves = [d if own == key else x for d, x, own in zip(done, leaves, how, strict=True)]
    return treedef.unflatten(leaves), comm_state


def _average(
    tree: Any, axes: tuple[str, ...], scattered: tuple[int, tuple[str, ...]] | None, name: str
) -> Any:
    """Average leaves that are laid out alike: None stands for the others."""
    if scattered is not None:
        dim, parts = scattered
        tree = reduce_scatter(tree, parts, dim=dim, mean=True, name=name)
        axes = tuple(axis for axis in axes if axis not in parts)
    return pmean(tree, axes, name=name) if axes else tree
