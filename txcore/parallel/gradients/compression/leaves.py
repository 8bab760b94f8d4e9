"""Compressed averages of a pytree's leaves, in groups that are laid out alike."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from txcore.collectives import _leaves
from txcore.collectives._leaves import Leaf
from txcore.layout import Layout
from txcore.parallel.gradients.apart import keep_apart
from txcore.parallel.gradients.buckets import Buckets, whole_before
from txcore.parallel.gradients.compression.feedback import (
    KEY,
    average_compressed,
    exchange_of,
    group_leaves,
    is_compressed,
)
from txcore.parallel.gradients.compression.record import Compression, Exchange
from txcore.parallel.lone_axes import make_equal_along_lone_axes


def average_leaves(
    compression: Compression,
    grads: Any,
    layouts: Any,
    comm_state: Any,
    name: str,
    *,
    buckets: Buckets | None = None,
    axes: tuple[str, ...] = (),
) -> tuple[dict[int, jax.Array], Any]:
    """Average the leaves that are compressed.

    Args:
      compression: how.
      grads: pytree of gradients, local to each device.
      layouts: pytree of `Layout` like them.
      comm_state: with what the compression keeps, if it does.
      name: label of the operations' tags.
      buckets: the sizes of what is averaged together; None for all.
      axes: the data axes.

    Returns:
      The means by the number of the leaf, and the new `comm_state`.

    Raises:
      ValueError: a leaf is reduced already, or `comm_state` is not that of these gradients.
    """
    treedef: Any = jax.tree.structure(layouts)
    laid = jax.tree.leaves(layouts)
    found: list[Any] = [
        _check_local(name, path, leaf, layout) if is_compressed(jnp.asarray(leaf)) else None
        for (path, leaf), layout in zip(_with_paths(grads), laid, strict=True)
    ]
    state = _state_of(compression, comm_state)
    errors = _kept_of("errors", state, treedef, found)
    own = _kept_of("own", state, treedef, found)
    steps = state.get("steps")
    arrays = [jnp.asarray(leaf) for _, leaf in _with_paths(grads)]
    whole = [whole_before(leaf, layout, axes) for leaf, layout in zip(arrays, laid, strict=True)]
    groups = group_leaves([leaf for leaf, _ in whole], [layout for _, layout in whole], buckets)
    jobs, arguments = [], []
    for i, chosen in enumerate(groups):
        over = laid[chosen[0]].reduced
        sizes = {axis: _leaves.axes_size((axis,)) for axis in over}
        local = [make_equal_along_lone_axes(found[i], over, name) for i in chosen]
        left = [errors[i] for i in chosen]
        if "errors" in state:
            left = [make_equal_along_lone_axes(error, over, name) for error in left]
        label = name if buckets is None else f"{name}/{i}"
        exchange = exchange_of([laid[i] for i in chosen], sizes, label)
        jobs.append(partial(_average_group, compression, exchange))
        arguments.append((local, left, [own[i] for i in chosen], steps))
    pairs = zip(jobs, arguments, strict=True)
    results = (
        [job(argument) for job, argument in pairs]
        if buckets is None
        else keep_apart(jobs, arguments, name)
    )
    means: dict[int, jax.Array] = {}
    for chosen, done in zip(groups, results, strict=True):
        for i, mean, error, new_own in zip(chosen, *done, strict=True):
            means[i], errors[i], own[i] = mean, error, new_own
    if not state:
        return means, comm_state
    new = {"errors": treedef.unflatten(errors), "own": treedef.unflatten(own)}
    if steps is not None:
        new["steps"] = steps + 1
    return means, {**comm_state, KEY: {key: new[key] for key in state}}


def _average_group(compression: Compression, exchange: Exchange, given: Any) -> Any:
    grads, errors, kept, steps = given
    return average_compressed(compression, grads, errors, kept, steps, exchange)


def _with_paths(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]


def _check_local(name: str, path: Any, value: Any, layout: Layout) -> jax.Array:
    """Refuse a gradient that is reduced already, as `pmean` does."""
    leaf = Leaf(jnp.asarray(value), name + jax.tree_util.keystr(path))
    return _leaves.check_local("sync_gradients", leaf, layout.reduced)


def _state_of(compression: Compression, comm_state: Any) -> dict[str, Any]:
    if not compression.has_state:
        return {}
    if not isinstance(comm_state, dict) or KEY not in comm_state:
        raise ValueError(
            f"tx.sync_gradients with compression={compression} needs comm_state= what it keeps "
            f"from step to step, got {comm_state!r}: begin with comm_state, specs = "
            "tx.compression.start(compression, params, axis, mesh), and pass on what "
            "sync_gradients returns"
        )
    return dict(comm_state[KEY])


def _kept_of(key: str, state: dict[str, Any], treedef: Any, found: list[Any]) -> list[Any]:
    """Return what is kept of each leaf, None for nothing."""
    if key not in state:
        return [None] * len(found)
    try:
        kept = treedef.flatten_up_to(state[key])
        shapes = [leaf if leaf is None else leaf.shape for leaf in found]
        fits = key != "errors" or shapes == [k if k is None else k.shape[1:] for k in kept]
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            "tx.sync_gradients needs the gradients that its comm_state was made for: what each "
            "leaf still lacks is kept by its path and shape. In an engine they are those of "
            "state.params; average others with tx.pmean"
        )
    return list(kept)
