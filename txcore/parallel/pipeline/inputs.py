"""What a pipeline is given: its parameters, the batch in microbatches, the mean over examples."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from txcore import _compat
from txcore.collectives import _leaves, axis_index, axis_size, psum, vary
from txcore.parallel.pipeline.schedule import Schedule
from txcore.step_scope import current_scope

Axis = str | tuple[str, ...]


class Inputs(NamedTuple):
    """Hold a device's part of what a pipeline is given, varying along its axes.

    Attributes:
      stage: this device's index along the pipe axis.
      ends: the parameters that every device has.
      blocks: those of its chunks of layers, each leaf (chunks, ...).
      batch: each leaf (microbatches, examples, ...).
      mask: (microbatches, examples, ...), or None.
      count: the number of real values of the global batch, int32; None without a mask.
      axes: the pipe axis, and the data axes.
    """

    stage: jax.Array
    ends: Any
    blocks: Any
    batch: Any
    mask: Any
    count: Any
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
    data_axes = _find_data_axes(op, data_axis)
    _check_params(op, params, schedule.chunks, pipe)
    ends = {name: part for name, part in params.items() if name != "blocks"}
    blocks = jax.tree.map(lambda leaf: leaf[:, 0], params["blocks"])
    batch, mask = (
        _split_batch(op, what, tree, schedule.microbatches, pipe, data_axes)
        for what, tree in (("batch", batch), ("mask", mask))
    )
    every = (pipe, *data_axes)
    return Inputs(
        axis_index(pipe),
        vary(ends, every, name="params"),
        vary(blocks, every, name="params"),
        vary(batch, pipe, name="batch"),
        None if mask is None else vary(mask, pipe, name="mask"),
        _count_real(mask, data_axes),
        every,
    )


def _find_data_axes(op: str, data_axis: Axis | None) -> tuple[str, ...]:
    scope = current_scope()
    if data_axis is None:
        return scope.data_axes if scope is not None else ()
    if data_axis == ():
        return ()
    return _leaves.check_axes(op, data_axis)


def _check_params(op: str, params: Any, chunks: int, pipe: str) -> None:
    if not isinstance(params, dict) or "blocks" not in params:
        got = f"the keys {sorted(params)}" if isinstance(params, dict) else type(params).__name__
        raise TypeError(
            f"tx.{op} needs params= a dict with 'blocks', the layers, and whatever else the first "
            f"and the last stage use, got {got}"
        )
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        where = f"params{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"tx.{op} needs floating-point parameters, got {leaf.dtype} at {where}")
        of_blocks = path[0].key == "blocks"
        varies = _leaves.varies_along(jnp.asarray(leaf), pipe)
        if of_blocks and jnp.shape(leaf)[:2] != (chunks, 1):
            raise ValueError(
                f"tx.{op} needs {where} of shape ({chunks}, 1, ...) on each device, got "
                f"{jnp.shape(leaf)}: give tx.pipeline.split_layers(layers, schedule) to the "
                f"shard_map with the spec P(None, {pipe!r})"
            )
        if axis_size(pipe) > 1 and varies is (not of_blocks):
            raise ValueError(
                f"tx.{op} needs the layers in params['blocks'] to be each device's own along axis "
                f"{pipe!r}, spec P(None, {pipe!r}), and all other parameters to be the same there, "
                f"spec P(): {where} is not"
            )


def _split_batch(
    op: str, what: str, tree: Any, microbatches: int, pipe: str, data_axes: tuple[str, ...]
) -> Any:
    def split_leaf(path: Any, leaf: Any) -> jax.Array:
        where = what + jax.tree_util.keystr(path)
        leaf = jnp.asarray(leaf)
        rows = leaf.shape[0] if leaf.ndim else 0
        if not rows or rows % microbatches:
            raise ValueError(
                f"tx.{op} needs {where} with a multiple of {microbatches} rows on each device, to "
                f"split it into {microbatches} microbatches, got shape {leaf.shape}"
            )
        others = _compat.varying_axes(leaf) - {*data_axes}
        if pipe in others:
            raise ValueError(
                f"tx.{op} needs {where} to be the same along axis {pipe!r}, since every stage "
                "reads it: its spec must not name that axis"
            )
        if others:
            raise ValueError(
                f"tx.{op} needs data_axis= all axes that the batch is sharded over, got "
                f"{data_axes}: {where} varies along {_leaves.names_of(sorted(others))} too"
            )
        return leaf.reshape(microbatches, rows // microbatches, *leaf.shape[1:])

    return jax.tree_util.tree_map_with_path(split_leaf, tree)


def _count_real(mask: jax.Array | None, data_axes: tuple[str, ...]) -> jax.Array | None:
    """Count the real values of the global batch: it has one count, whatever its microbatches."""
    if mask is None:
        return None
    count = jnp.sum(mask != 0, dtype=jnp.int32)
    if not data_axes:
        return count
    # A mask that is the same on every device still counts once for each device's examples.
    return psum(vary(count, data_axes, name="example_count"), data_axes, name="example_count")
