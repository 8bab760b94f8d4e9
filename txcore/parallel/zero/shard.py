"""Handles of parameters that are stored in parts, and how they become whole."""

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from txcore import _compat
from txcore.collectives.all_gather import all_gather
from txcore.collectives.vary import vary
from txcore.layout import Layout, same_structure
from txcore.parallel.gradients.sync import sync_gradients
from txcore.step_scope import StepScope, current_scope


class Label(str):
    """Name a parameter. All labels are equal, so that the parts of several layers can be stacked.

    jax compares what is static in a tree to map two trees together.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str)

    def __hash__(self) -> int:
        return hash(Label)


_META = ("dim", "axes", "name", "view")


@partial(jax.tree_util.register_dataclass, data_fields=("part",), meta_fields=_META)
@dataclass(frozen=True)
class Shard:
    """Hold this device's part of a parameter, and how it becomes whole.

    It is no array: `tx.zero.gather` makes one of it. As a pytree it has one leaf, so that jax's
    transformations take it, and `lax.scan` over a stack of layers takes slices of it.

    Attributes:
      part: this device's part.
      dim: the dim that is split, counted from the last, which is -1.
      axes: the mesh axes that split it, in row-major order.
      name: the parameter's, for tags and errors.
      view: whether it stands for an array of `state.params`, so that `tx.value_and_grad` gathers.

    Example:
      >>> tx.zero.Shard(np.zeros((2, 4)), -1, ("data",), "w").part.shape
      (2, 4)
    """

    part: jax.Array
    dim: int
    axes: tuple[str, ...]
    name: str = ""
    view: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", Label(self.name))


def is_shard(x: Any) -> bool:
    """Tell whether a node of a pytree is a `Shard`."""
    return isinstance(x, Shard)


def is_view(x: Any) -> bool:
    """Tell whether a node of a pytree stands for an array of `state.params`."""
    return isinstance(x, Shard) and x.view


def as_shards(params: Any, layouts: Any) -> Any:
    """Make a handle of each parameter that is stored in parts over the data axes.

    Args:
      params: pytree of the parameters as this device stores them.
      layouts: pytree of `txcore.layout.Layout` like them (`plan.layouts(params, mesh)`).

    Returns:
      The tree, with a `Shard` for each such parameter; the others are there as they are, cast to
      vary along the axes over which their gradients are averaged.

    Example:
      >>> plan = tx.Plan(data_parallel=tx.DP("data", shard="parameters"))
      >>> layouts = plan.layouts({"w": np.zeros((4, 2))}, tx.MeshSpec(jax.devices()[:2]))
      >>> def f(w):
      ...     return tx.zero.gather(tx.zero.as_shards({"w": w}, layouts))["w"].sum()[None]
      >>> tx.testing.run_sharded(f, np.ones((4, 2)), axes={"data": 2})
      array([8., 8.], dtype=float32)
    """

    def one(path: Any, x: jax.Array, layout: Layout) -> Any:
        if layout.reduced:
            x = vary(x, layout.reduced, name="params")
        if layout.gathered is None:
            return x
        dim, axes = layout.gathered
        return Shard(x, dim - x.ndim, axes, jax.tree_util.keystr(path, simple=True, separator="."))

    return jax.tree_util.tree_map_with_path(one, params, layouts)


def as_views(params: Any, scope: StepScope) -> Any:
    """Return whole parameters, of which `find_views` knows what they were made of."""

    def one(shard: Any) -> Any:
        if not is_shard(shard):
            return shard
        whole = _gather_one(shard, "")
        scope.views[id(whole)] = whole, replace(shard, view=True)
        return whole

    return jax.tree.map(one, as_shards(params, scope.layouts), is_leaf=is_shard)


def find_views(tree: Any) -> Any:
    """Return a tree with handles in place of what `state.params` has gathered."""
    scope = current_scope()
    if scope is None or not scope.views:
        return tree
    return jax.tree.map(lambda x: scope.views.get(id(x), (x, x))[1], tree)


def scatter_early(grads: Any) -> Any:
    """Return of one microbatch's gradients the parts that are kept, where the plan shards them.

    Gradients of another structure than the parameters are left alone.
    """
    scope = current_scope()
    if scope is None or not scope.shards_gradients or not same_structure(grads, scope.layouts):
        return grads

    def first_step(layout: Layout) -> Layout:
        axes = () if layout.scattered is None else layout.scattered[1]
        return replace(layout, reduced=axes)

    early = jax.tree.map(first_step, yet_to_reduce(grads, scope))
    return sync_gradients(grads, scope.data_axes, layouts=early, **scope.sync_options)[0]


def yet_to_reduce(grads: Any, scope: StepScope) -> Any:
    """Return the layouts of gradients, without the reductions that `gather` has made of some."""
    treedef: Any = jax.tree.structure(scope.layouts)
    layouts = jax.tree.leaves(scope.layouts)
    rows = zip(jax.tree.leaves(grads), layouts, scope.gradient_shapes, strict=True)
    left = []
    for grad, layout, part in rows:
        if layout.scattered is not None and np.shape(grad) == part:
            rest = tuple(axis for axis in layout.reduced if axis not in layout.scattered[1])
            layout = replace(layout, reduced=rest)
        left.append(layout)
    return treedef.unflatten(left)


def parts_of(tree: Any) -> Any:
    """Return a tree with the parts themselves in place of their handles."""
    return jax.tree.map(lambda x: x.part if is_shard(x) else x, tree, is_leaf=is_shard)


def gather(shards: Any) -> Any:
    """Make whole parameters of their handles, on every device.

    Equation: `all_gather(part, axes, dim=dim)`. Transpose: `reduce_scatter(..., mean=True)`, so
    that a gradient comes out as this device's part of the mean over the axes. XLA may combine the
    gathers of one call, and not those of two (of two layers).

    Args:
      shards: pytree, with a `Shard` for each parameter that is to be gathered; what else it holds
        stays as it is, so that the same model runs under every plan.

    Returns:
      The tree with whole arrays, which vary along the axes: gradients with respect to other
      things that are made of them are local.

    Raises:
      ValueError: the dim that is split is gone, as in a slice of a stack of layers whose leading
        dim was split.
      NameError: an axis is not bound here.

    Example:
      >>> def f(x):
      ...     shard = tx.zero.Shard(x, -1, ("data",), "w")
      ...     loss = lambda s: jax.numpy.sum(tx.zero.gather(s) ** 2)
      ...     return tx.value_and_grad(loss, axis="data")(shard)[1]
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 2})
      array([0., 2., 4., 6.], dtype=float32)

    References:
      Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models",
      2020 (stage 3).
    """
    names = [str(x.name) for x in jax.tree.leaves(shards, is_leaf=is_shard) if is_shard(x)]
    return gather_together(shards, f"zero/{names[0]}" if names else "")


def gather_together(shards: Any, key: str) -> Any:
    """Gather all handles of a tree, which XLA combines with those of the same key; "" for any."""

    def one(x: Any) -> Any:
        return _gather_one(x, key) if is_shard(x) else x

    return jax.tree.map(one, shards, is_leaf=is_shard)


def _gather_one(shard: Shard, key: str) -> jax.Array:
    if shard.part.ndim < -shard.dim:
        name = str(shard.name) or "a parameter"
        raise ValueError(
            f"tx.zero.gather needs the dim that is split ({shard.dim}, counted from the last) of "
            f"{name}, got a part of shape {shard.part.shape}: a stack of layers can be taken apart "
            "where another dim than the layers' is split. Make the layers' dim the smaller one, or "
            "keep them in a list"
        )
    scope = current_scope()
    options = {} if scope is None else scope.sync_options
    how = _Gather(
        *(shard.dim, shard.axes, str(shard.name), key),
        algorithm=options.get("algorithm"),
        compression=options.get("compression"),
    )
    return _gather_part(shard.part, how)


@dataclass(frozen=True)
class _Gather:
    """State how a part becomes whole, and the whole's gradient one of the part."""

    dim: int
    axes: tuple[str, ...]
    name: str
    key: str
    algorithm: Any = None
    compression: Any = None


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_part(part: jax.Array, how: _Gather) -> jax.Array:
    with _combine_exchanges(how.key):
        return all_gather({how.name: part}, how.axes, dim=how.dim, name="params")[how.name]


def _gather_forward(part: jax.Array, how: _Gather) -> tuple[jax.Array, None]:
    return _gather_part(part, how), None


def _scatter_backward(how: _Gather, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    entries: list[Any] = [None] * cotangent.ndim
    entries[how.dim] = how.axes
    with _combine_exchanges(how.key):
        grads, _ = sync_gradients(
            {how.name: cotangent},
            how.axes,
            layouts={how.name: Layout(P(), P(*entries), how.axes)},
            algorithm=how.algorithm,
            compression=how.compression,
        )
    return (grads[how.name],)


_gather_part.defvjp(_gather_forward, _scatter_backward)


def _combine_exchanges(key: str) -> contextlib.AbstractContextManager[Any]:
    # A layer's gradients that waited for those of others would all be there at once.
    return _compat.combiner_key(key) if key else contextlib.nullcontext()
