"""A pipeline of one stage: the same functions one after the other, on one device."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore.parallel import zero
from txcore.parallel.differentiate import value_and_grad as differentiate
from txcore.parallel.pipeline.inputs import (
    Axis,
    check_params,
    count_rows,
    find_data_axes,
    split_params,
    split_rows,
    take_means,
    vary_rows,
)
from txcore.parallel.pipeline.means import Means
from txcore.parallel.pipeline.route import Route
from txcore.parallel.pipeline.stages import Function, make_average

Functions = tuple[Function, Function, Function]


def value_and_grad(
    op: str,
    functions: Functions,
    where: Route,
    params: Any,
    batch: Any,
    mask: Any,
    *,
    has_aux: bool,
    loss_scale: Any,
    data_axis: Axis | None,
) -> Any:
    """Return what a pipeline would, by `tx.value_and_grad` of all layers."""
    means, given = _prepare_call(op, where, params, batch, mask, data_axis)
    count = means.microbatches

    def loss_of(params: Any, given: Any) -> Any:
        loss, aux = _run_microbatches(functions, where, means, params, *given, has_aux=has_aux)
        # The parts of microbatches add up, and tx.value_and_grad takes their mean.
        return loss * count, jax.tree.map(lambda a: a * count, aux)

    run = differentiate(
        loss_of,
        has_aux=True,
        axis=data_axis,
        loss_scale=loss_scale,
        microbatches=count if count > 1 else None,
    )
    (loss, aux), grads = run(params, given)
    if count > 1:
        aux = jax.tree.map(lambda a: jnp.mean(a, 0), aux)
    return ((loss, aux) if has_aux else loss), grads


def evaluate(
    op: str,
    functions: Functions,
    where: Route,
    params: Any,
    batch: Any,
    mask: Any,
    *,
    has_aux: bool,
    data_axis: Axis | None,
) -> Any:
    """Return the loss that a pipeline would."""
    params = zero.gather(params)
    means, given = _prepare_call(op, where, params, batch, mask, data_axis)
    parts = split_rows(given, means.microbatches)

    def one(part: Any) -> Any:
        return _run_microbatches(functions, where, means, params, *part, has_aux=has_aux)

    loss, aux = jax.tree.map(lambda a: jnp.sum(a, 0), lax.map(one, parts))
    return (loss, aux) if has_aux else loss


def _prepare_call(
    op: str, where: Route, params: Any, batch: Any, mask: Any, data_axis: Axis | None
) -> tuple[Means, Any]:
    """Check what is given; return how the mean is taken, and (batch, mask)."""
    check_params(op, params, where.schedule.chunks)
    count = where.schedule.microbatches
    rows = count_rows(op, {"batch": batch, "mask": mask}, count)
    data_axes = find_data_axes(op, data_axis)
    means = take_means(op, mask, rows, count, data_axes)
    return means, vary_rows((batch, mask), data_axes)


def _run_microbatches(
    functions: Functions,
    where: Route,
    means: Means,
    params: Any,
    batch: Any,
    mask: Any,
    *,
    has_aux: bool,
) -> Any:
    """Run all layers on a microbatch; return its part of the loss and of what is beside it."""
    first, block, last = functions
    ends, blocks = split_params(params)
    x, chunks = first(ends, batch), where.schedule.chunks
    for c in range(chunks):
        chunk = jax.tree.map(lambda leaf, c=c: leaf[c], blocks) if chunks > 1 else blocks
        x = block(chunk, x, batch, jnp.int32(c))
    return make_average(last, means, has_aux=has_aux)(ends, x, batch, mask)
