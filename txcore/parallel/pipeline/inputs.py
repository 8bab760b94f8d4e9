"""What a pipeline is given: its parameters, and the batch in microbatches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from txcore import _compat
from txcore.collectives import _leaves, axis_index, axis_size, vary
from txcore.parallel import zero
from txcore.parallel.pipeline.means import Means, sum_mask
from txcore.parallel.pipeline.schedule import Schedule
from txcore.step_scope import current_scope

Axis = str | tuple[str, ...]


class Inputs(NamedTuple):
    """Hold a device's part of what a pipeline is given, varying along its axes.

    Attributes:
      stage: this device's index along the pipe axis.
      ends: the parameters that every device has.
      blocks: those of its chunks of layers, each leaf (chunks, layers of a chunk, ...).
      batch: each leaf (microbatches, examples, ...).
      mask: (microbatches, examples, ...), or None.
      means: how values of a microbatch become its part of the mean.
      axes: the pipe axis, and the data axes.
    """

    stage: jax.Array
    ends: Any
    blocks: Any
    batch: Any
    mask: Any
    means: Means
    axes: tuple[str, ...]


def check_inputs(
    op: str,
    schedule: Schedule,
    params: Any,
    batch: Any,
    mask: Any,
    axis: str,
    data_axis: Axis | None,
) -> Inputs:
    """Check what a pipeline is given, split the batch, and cast all of it to vary."""
    (pipe,) = _leaves.check_axes(op, axis)
    if axis_size(pipe) != schedule.stages:
        raise ValueError(
            f"tx.{op} needs a schedule of as many stages as axis {pipe!r} has devices, "
            f"{axis_size(pipe)}, got one of {schedule.stages}: "
            f"make_schedule({schedule.name!r}, stages={axis_size(pipe)}, ...)"
        )
    data_axes = find_data_axes(op, data_axis)
    params = zero.gather(params)
    check_params(op, params, schedule.chunks)
    _check_spread(op, params, schedule.chunks, pipe)
    _check_batch(op, {"batch": batch, "mask": mask}, pipe, data_axes, data_axis is not None)
    rows = count_rows(op, {"batch": batch, "mask": mask}, schedule.microbatches)
    means = take_means(op, mask, rows, schedule.microbatches, data_axes)
    batch, mask = split_rows((batch, mask), schedule.microbatches)
    every = (pipe, *data_axes)
    ends, blocks = split_params(params)
    one = schedule.chunks == 1
    return Inputs(
        axis_index(pipe),
        vary(ends, every, name="params"),
        vary(jax.tree.map(lambda leaf: leaf[None] if one else leaf, blocks), every, name="params"),
        vary_rows(batch, (pipe,)),
        vary_rows(mask, (pipe,)),
        means,
        every,
    )


def take_means(
    op: str, mask: Any, rows: int, microbatches: int, data_axes: tuple[str, ...]
) -> Means:
    """Return how the mean over a batch of so many rows on this device is taken."""
    return Means(op, data_axes, microbatches, rows // microbatches, sum_mask(mask, data_axes))


def find_data_axes(op: str, data_axis: Axis | None) -> tuple[str, ...]:
    """Return the axes that the batch is sharded over: those given, or a step's."""
    scope = current_scope()
    if data_axis is None:
        return scope.data_axes if scope is not None else ()
    if data_axis == ():
        return ()
    return _leaves.check_axes(op, data_axis)


def split_params(params: Any) -> tuple[Any, Any]:
    """Return the parameters of the first and the last stage, and those of the layers."""
    ends = {name: part for name, part in params.items() if name != "blocks"}
    return ends, params["blocks"]


def check_params(op: str, params: Any, chunks: int) -> None:
    """Refuse parameters without layers, or whose layers are stacked in another way."""
    if not isinstance(params, dict) or "blocks" not in params:
        got = f"the keys {sorted(params)}" if isinstance(params, dict) else type(params).__name__
        raise TypeError(
            f"tx.{op} needs params= a dict with 'blocks', the layers, and whatever else the first "
            f"and the last stage use, got {got}"
        )
    stacked: dict[tuple[int, ...], str] = {}
    dims = 1 + (chunks > 1)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        where = f"params{jax.tree_util.keystr(path)}"
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"tx.{op} needs floating-point parameters, got {dtype} at {where}")
        if path[0].key != "blocks":
            continue
        shape = jnp.shape(leaf)
        if len(shape) < dims or (chunks > 1 and shape[0] != chunks):
            of_chunk = "(layers of this device, ...)"
            if chunks > 1:
                of_chunk = f"({chunks}, layers of a chunk, ...)"
            raise ValueError(
                f"tx.{op} needs {where} of shape {of_chunk} on each device, the layers of "
                f"{chunks} chunks, got {shape}: give tx.pipeline.split_layers(layers, schedule) to "
                "a shard_map of your own; in an engine's step, state.params as it is"
            )
        stacked.setdefault(shape[:dims], where)
    if len(stacked) > 1:
        (one, there), (other, where) = list(stacked.items())[:2]
        raise ValueError(
            f"tx.{op} needs as many layers in each leaf of params['blocks'], got {one} at {there} "
            f"and {other} at {where}: stack the layers in front"
        )


def _check_spread(op: str, params: Any, chunks: int, pipe: str) -> None:
    """Refuse layers that are the same on all stages, and other parameters that are not."""
    if axis_size(pipe) == 1:
        return
    spec = f"P({'None, ' if chunks > 1 else ''}{pipe!r})"
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        of_blocks = path[0].key == "blocks"
        if _leaves.varies_along(jnp.asarray(leaf), pipe) is (not of_blocks):
            raise ValueError(
                f"tx.{op} needs the layers in params['blocks'] to be each device's own along axis "
                f"{pipe!r}, spec {spec}, and all other parameters to be the same there, "
                f"spec P(): params{jax.tree_util.keystr(path)} is not"
            )


def _check_batch(
    op: str, trees: dict[str, Any], pipe: str, data_axes: tuple[str, ...], named: bool
) -> None:
    """Refuse a batch that differs along axes along which it must not."""
    known = current_scope() is not None and not named  # a step's plan knows its data axes

    def check(path: Any, leaf: Any) -> None:
        where = f"{path[0].key}{jax.tree_util.keystr(path[1:])}"
        others = _compat.varying_axes(leaf) - {*data_axes}
        if pipe in others:
            raise ValueError(
                f"tx.{op} needs {where} to be the same along axis {pipe!r}, since every stage "
                "reads it: its spec must not name that axis"
            )
        if others and not known:
            raise ValueError(
                f"tx.{op} needs data_axis= all axes that the batch is sharded over, got "
                f"{data_axes}: {where} varies along {_leaves.names_of(sorted(others))} too"
            )

    for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]:
        check(path, _as_array(leaf))


def count_rows(op: str, trees: dict[str, Any], microbatches: int) -> int:
    """Return how many rows a batch has on this device; refuse what microbatches do not divide."""
    rows: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]:
        where = f"{path[0].key}{jax.tree_util.keystr(path[1:])}"
        shape = jnp.shape(leaf)
        count = shape[0] if shape else 0
        if not count or count % microbatches:
            raise ValueError(
                f"tx.{op} needs {where} with a multiple of {microbatches} rows on each device, to "
                f"split it into {microbatches} microbatches, got shape {shape}"
            )
        rows.setdefault(count, where)
    if len(rows) != 1:
        given = ", ".join(f"{count} in {where}" for count, where in rows.items()) or "none"
        raise ValueError(
            f"tx.{op} needs as many rows in each leaf of the batch and the mask, got {given}: what "
            "all examples share is no part of the batch, let the functions take it from outside"
        )
    return next(iter(rows))


def split_rows(tree: Any, microbatches: int) -> Any:
    """Return each leaf as (microbatches, examples, ...)."""

    def split(leaf: Any) -> jax.Array:
        leaf = _as_array(leaf)
        return leaf.reshape(microbatches, leaf.shape[0] // microbatches, *leaf.shape[1:])

    return jax.tree.map(split, tree)


def vary_rows(tree: Any, axes: tuple[str, ...]) -> Any:
    """Return a batch that varies along some axes; it may hold the keys of its examples."""

    def one(leaf: Any) -> jax.Array:
        if not _compat.is_key_array(leaf):
            varying: jax.Array = vary(leaf, axes, name="batch")
            return varying
        missing = tuple(sorted({*axes} - _compat.varying_axes(leaf)))
        return _compat.cast_to_varying(leaf, missing) if missing else leaf

    return jax.tree.map(one, tree) if axes else tree


def _as_array(leaf: Any) -> jax.Array:
    return leaf if _compat.is_key_array(leaf) else jnp.asarray(leaf)
