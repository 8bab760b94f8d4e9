"""What a step may return: a state that fits the next step, and metrics of the whole batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from txcore import _compat
from txcore.layout import axes_of
from txcore.parallel.data import global_count
from txcore.parallel.gradients.delayed import keep_newest
from txcore.plan.plan import Plan
from txcore.printing import name_of
from txcore.train.batches.batch import mask_of
from txcore.train.numerics.loss_scale import select
from txcore.train.state.claims import claim_equal
from txcore.train.state.state import TrainState
from txcore.train.steps.means import all_are_means, divide_means


def check_train_output(
    fn: Callable[..., Any], before: TrainState, out: Any, specs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training step's new arrays and its metrics; refuse another kind of result.

    Args:
      fn: the step.
      before: the state it was given.
      out: what it returned.
      specs: how each array of a state lies on the mesh, by field.

    Raises:
      TypeError: it is no pair of a state and a dict.
      ValueError: the state does not fit the next step, misses the plan's communication, or a
        value differs between devices that should not.
    """
    if isinstance(out, tuple) and len(out) == 2:
        state, metrics = out
        if isinstance(state, TrainState) and isinstance(metrics, dict):
            _check_communicates(fn, before, state)
            after = _unless_overflowed(before, _check_state(fn, before, state, specs))
            return after.arrays, divide_means(_check_metrics(metrics))
    remedy = ""
    if isinstance(out, dict):
        remedy = ": run a step that returns metrics only with engine.evaluate"
    raise TypeError(
        f"{name_of(fn)} needs to return (state, metrics), the state that apply_gradients "
        f"returned and a dict, got {_describe_types(out)}{remedy}"
    )


def check_metrics_alone(fn: Callable[..., Any], out: Any) -> dict[str, Any]:
    """Return the metrics of an evaluation's step; refuse another kind of result."""
    if isinstance(out, dict):
        return _check_metrics(out)
    raise TypeError(
        f"engine.evaluate needs a step that returns a dict of metrics, got {_describe_types(out)} "
        f"from {name_of(fn)}"
    )


def count_examples(
    batch: Any, plan: Plan, row_axes: tuple[str, ...], metrics: dict[str, Any]
) -> jax.Array | None:
    """Return how many examples of the global batch are real; None where nothing weighs by them."""
    mask = mask_of(batch)
    if mask is None or "mask" in plan.batch or all_are_means(metrics):
        return None
    if mask.ndim != 1:
        raise ValueError(
            "engine.evaluate weighs batches by the real examples in batch['mask'], 1 or 0 for each "
            f"in shape (batch,), got {mask.shape}: return every metric as tx.Mean(total, count), "
            "which are added up over the batches, or give a mask of something else (of tokens) "
            "another name"
        )
    return global_count(mask, row_axes) if row_axes else (mask != 0).sum()


def _check_communicates(fn: Callable[..., Any], before: TrainState, after: TrainState) -> None:
    """Refuse a step that trains, and does without what its plan keeps from step to step."""

    def is_same(name: str) -> bool:
        trees = (jax.tree.leaves(getattr(state, name)) for state in (before, after))
        return all(old is new for old, new in zip(*trees, strict=False))

    if before.comm_state is not None and is_same("comm_state") and not is_same("stored_params"):
        raise ValueError(
            f"{name_of(fn)} needs to reduce its gradients by grads, state = "
            f"state.sync_gradients(grads) under {before.engine.plan}, which keeps a part of them "
            "from step to step: it changed the parameters without that (by tx.pmean?)"
        )


def _check_state(
    fn: Callable[..., Any], old: TrainState, new: TrainState, specs: dict[str, Any]
) -> TrainState:
    """Refuse a state that would not fit the next step (it would compile anew each time).

    Each leaf has to be the same on all devices, but along the axes over which it is stored.
    """
    old_tree: Any = jax.tree.structure(old)
    new_tree: Any = jax.tree.structure(new)
    if old_tree != new_tree:
        raise ValueError(
            f"{name_of(fn)} needs to return a state with the structure it was given, {old_tree}, "
            f"got {new_tree}: create what it adds in engine.create_state(params, extra=...)"
        )

    def check(path: Any, before: Any, after: Any, spec: P) -> jax.Array:
        if after is before:
            return after
        where = f"state{jax.tree_util.keystr(path)}"
        after = jnp.asarray(after)
        if (after.shape, after.dtype) != (before.shape, before.dtype):
            raise ValueError(
                f"{name_of(fn)} needs to return {where} as {before.dtype}{list(before.shape)}, as "
                f"it was given, got {after.dtype}{list(after.shape)}"
            )
        error = (
            f"{name_of(fn)} needs to return a state that is the same on every device, but "
            f"{where} varies along axis {{axis}}: reduce it, for example with tx.pmean"
        )
        axes, split = _compat.bound_axes(), axes_of(spec)
        after = claim_equal(after, axes, split=split, what=where, error=error)
        return lax.convert_element_type(after, before.dtype)  # drops a weak type

    return jax.tree_util.tree_map_with_path(check, old, new, TrainState(**specs, owner=old.owner))


def _unless_overflowed(before: TrainState, after: TrainState) -> TrainState:
    """Undo all that a float16 step did (`extra` too) where its gradients overflowed."""
    if before.loss_scaling is None or after.loss_scaling is None:
        return after
    overflowed = after.loss_scaling.skipped_steps != before.loss_scaling.skipped_steps
    undone = select(overflowed, before, after)
    comm_state = keep_newest(undone.comm_state, after.comm_state)
    return undone.replace(loss_scaling=after.loss_scaling, comm_state=comm_state)


def _check_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Refuse a metric that differs between devices."""

    def check(path: Any, value: Any) -> jax.Array:
        where = f"metrics{jax.tree_util.keystr(path)}"
        error = (
            f"{where} varies along axis {{axis}}: it is one device's value, not the global one. "
            "Report tx.pmean(..., {axis}) of a mean, tx.psum(..., {axis}) of a count"
        )
        return claim_equal(jnp.asarray(value), _compat.bound_axes(), what=where, error=error)

    return jax.tree_util.tree_map_with_path(check, metrics)


def _describe_types(out: Any) -> str:
    """Write the types that a step returned."""
    if isinstance(out, tuple):
        return f"({', '.join(type(o).__name__ for o in out)})"
    return type(out).__name__
