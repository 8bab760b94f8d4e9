"""Run a pipeline inside `shard_map`: value_and_grad by a schedule, and evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore.collectives import psum, shift
from txcore.parallel.differentiate import check_needed_scale, check_scale, check_unscalable
from txcore.parallel.pipeline import one_stage
from txcore.parallel.pipeline.buffers import plan_buffers
from txcore.parallel.pipeline.inputs import Axis, Inputs, check_inputs
from txcore.parallel.pipeline.making import make_schedule
from txcore.parallel.pipeline.passes import Carry, Runner, Turn, take_turn
from txcore.parallel.pipeline.programs import StageProgram, trace_stage
from txcore.parallel.pipeline.route import find_route
from txcore.parallel.pipeline.schedule import Schedule
from txcore.parallel.pipeline.slots import used_ticks
from txcore.parallel.pipeline.stages import Function, Stages, prepare_stages
from txcore.parallel.pipeline.ticks import (
    Row,
    Segment,
    cut_ticks,
    make_rows,
    slice_rows,
)
from txcore.step_scope import current_scope


def value_and_grad(
    first: Function,
    block: Function,
    last: Function,
    schedule: Schedule | None = None,
    *,
    axis: str | None = None,
    data_axis: Axis | None = None,
    has_aux: bool = False,
    loss_scale: jax.Array | float | None = None,
) -> Callable[..., Any]:
    """Differentiate a model whose layers lie on the devices along an axis, in microbatches.

    Stands in the place of `tx.value_and_grad`, in a step under any plan, or in a `shard_map` of
    your own. In a step axis and schedule are those of `Plan(pipeline=PP(...))`; without one, or
    with one device along its axis, the same functions run one after the other, by
    `tx.value_and_grad` (in PP's microbatches).

    In a pipeline the batch is split into
    microbatches, each device runs its layers on one after the other, as the schedule says, and
    sends what it makes to the next: two permutes a tick, one each way, and no other collective
    until the last tick. What a forward pass leaves for the backward pass waits in as many slots as
    the schedule needs at a time. With `jax.checkpoint(block)` that is the block's input alone, and
    the rest is computed again.

    Equation: loss and gradients of `mean(last(first(batch) through all blocks))`, over the
    examples of this device's part of the batch, for `pmean` over the data axes, as of
    `tx.value_and_grad`. They don't depend on the schedule or on the number of microbatches.

    Args:
      first: `first(params, microbatch) -> x`, such as the embedding; computed again for its
        gradient. `params` are all but the blocks', `microbatch` has the batch's structure.
      block: `block(params, x, microbatch, stage) -> x`, a chunk of layers; `params` are its own,
        of shape (layers of the chunk, ...) after `split_layers`, and `stage` is the number of the
        virtual stage, from which follow those of its layers.
      last: `last(params, x, microbatch) -> losses` (or `(losses, aux)`): floating point, of shape
        (examples, ...), not averaged. `params` are those of `first`: what both use is tied.
      schedule: of as many stages as `axis` has devices; None for the plan's. A schedule with weight
        passes ("zb-h1") defers the gradients of those parameters whose equations stand by
        themselves: write the layers of a chunk as a Python loop, since a `lax.scan` makes all its
        gradients at once.
      axis: the pipe axis; None for the plan's.
      data_axis: the axes that the batch is sharded over; inside a step they are the plan's.
      has_aux: whether `last` returns `(losses, aux)`, with aux a pytree of arrays of shape
        (examples, ...), numbers of each example that are averaged as the losses are.
      loss_scale: `state.loss_scale`, as for `tx.value_and_grad`.

    Returns:
      A function of (params, batch, mask=None) that returns `(loss, gradients)`, or `((loss, aux),
      gradients)`. `params` is a dict with "blocks", stacked layers of which each device has its
      own: (layers, ...) by the spec `P(axis)`, with several chunks (chunks, layers / chunks, ...)
      by `P(None, axis)`. The other parameters are whole on each. `batch` is the same along the pipe
      axis. `mask` is 0 for what does not count, of the losses' shape or of its first dims: then the
      mean is that over all others of the global batch; other numbers weigh. The gradients lie as
      the parameters do, those of "blocks" each device's own and the others summed over the pipe
      axis; all vary along the data axes.

    Raises:
      ValueError: the schedule has another number of stages, the microbatches do not divide the
        batch, parameters or batch lie otherwise, `first` and `block` return different types, a
        function communicates over the pipe axis, the losses are reduced already, a step in
        float16 passes no loss_scale, or neither a plan nor the arguments name schedule and axis.
      TypeError: parameters or losses are not floating point, or params is no dict with "blocks".

    Example:
      >>> schedule = tx.pipeline.make_schedule("1f1b", stages=2, microbatches=2)
      >>> both = tx.pipeline.value_and_grad(
      ...     lambda params, batch: batch,
      ...     lambda params, x, batch, stage: x * params["w"][0],
      ...     lambda params, x, batch: x,
      ...     schedule, axis="pipe")
      >>> params = {"blocks": {"w": np.float32([2.0, 3.0])}}
      >>> spec = {"blocks": {"w": P("pipe")}}
      >>> loss, grads = tx.testing.run_sharded(
      ...     both, params, np.ones(4, np.float32), axes={"pipe": 2}, in_specs=(spec, P()),
      ...     out_specs=(P(), spec))
      >>> print(loss, grads["blocks"]["w"].tolist())
      6.0 [3.0, 2.0]

    References:
      As `make_schedule`. Chen et al., "Training deep nets with sublinear memory cost", 2016.
    """
    op = "pipeline.value_and_grad"
    check_scale(loss_scale)

    def wrapped(params: Any, batch: Any, mask: Any = None) -> Any:
        check_needed_scale(loss_scale, f"{op}(first, block, last")
        where = find_route(op, schedule, axis)
        functions = (first, block, last)
        if where.axis is None:
            return one_stage.value_and_grad(
                *(op, functions, where, params, batch, mask),
                has_aux=has_aux,
                loss_scale=loss_scale,
                data_axis=data_axis,
            )
        plan = where.schedule
        inputs = check_inputs(op, plan, params, batch, mask, where.axis, data_axis)
        stages = prepare_stages(op, functions, inputs, has_aux=has_aux)
        if (scope := current_scope()) is not None:
            scope.activations.append(jax.tree.map(jax.typeof, stages.x))
        program = _trace_block(plan, inputs, stages)
        run = Runner(plan, plan_buffers(plan), inputs, stages, program, loss_scale)
        carry, rows = run.start(), make_rows(plan, run.buffers, inputs.stage)
        for segment in cut_ticks(plan):

            def body(carry: Carry, row: dict[str, Row], segment: Segment = segment) -> Any:
                return run.tick(carry, row, segment), None

            carry, _ = lax.scan(body, carry, slice_rows(rows, segment.ticks))
        grads = _finish_gradients({"ends": inputs.ends, "blocks": inputs.blocks}, carry, loss_scale)
        (loss, aux), ends = _sum_over_stages(carry["means"], grads["ends"], where.axis)
        blocks = grads["blocks"]
        if plan.chunks == 1:
            blocks = jax.tree.map(lambda g: g[0], blocks)
        return ((loss, aux) if has_aux else loss), {**ends, "blocks": blocks}

    return wrapped


def _sum_over_stages(means: Any, ends: Any, axis: str) -> tuple[Any, Any]:
    """Add up what the stages have: zeros, but for the first and the last one."""
    summed = psum(means, axis, name="loss"), psum(ends, axis, name="grads")
    # XLA for GPU would make one nameless all-reduce of these sums and of the means over the data
    # axes that come next, where there is nothing between them.
    made: tuple[Any, Any] = lax.optimization_barrier(summed)
    return made


def _finish_gradients(params: Any, carry: Carry, loss_scale: Any) -> Any:
    """Return the sums of the gradients, unscaled, in the dtypes of their parameters."""

    def finish(p: Any, total: Any) -> Any:
        if loss_scale is not None:
            total = total / jnp.asarray(loss_scale, total.dtype)
        return total.astype(p.dtype)

    if loss_scale is not None:
        check_unscalable(params)
    return jax.tree.map(finish, params, {name: carry[name] for name in params})


def _trace_block(schedule: Schedule, inputs: Inputs, stages: Stages) -> StageProgram:
    chunk, microbatch = (jax.tree.map(lambda a: a[0], t) for t in (inputs.blocks, inputs.batch))
    split = schedule.splits_backward
    return trace_stage(stages.block, chunk, stages.x, microbatch, inputs.stage, split=split)


def _add_means(stages: Stages, inputs: Inputs, carry: Carry, turn: Turn, y: Any) -> Any:
    parts = stages.last(inputs.ends, y, turn.microbatch, turn.mask)
    return jax.tree.map(jnp.add, carry["means"], parts)


def evaluate(
    first: Function,
    block: Function,
    last: Function,
    schedule: Schedule | None = None,
    *,
    axis: str | None = None,
    data_axis: Axis | None = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Return the loss of a pipeline without gradients: the same stages, forward only.

    Args:
      first: as for `value_and_grad`.
      block: as for `value_and_grad`.
      last: as for `value_and_grad`.
      schedule: as for `value_and_grad`; its microbatches and chunks count.
      axis: as for `value_and_grad`.
      data_axis: as for `value_and_grad`.
      has_aux: as for `value_and_grad`.

    Returns:
      A function of (params, batch, mask=None) that returns the loss, or `(loss, aux)`, for `pmean`
      over the data axes. The batch goes through in the plan's (or the schedule's) microbatches.

    Raises:
      ValueError, TypeError: as `value_and_grad`.

    Example:
      >>> schedule = tx.pipeline.make_schedule("1f1b", stages=2, microbatches=2)
      >>> loss = tx.pipeline.evaluate(
      ...     lambda params, batch: batch,
      ...     lambda params, x, batch, stage: x * params["w"][0],
      ...     lambda params, x, batch: x,
      ...     schedule, axis="pipe")
      >>> params = {"blocks": {"w": np.float32([2.0, 3.0])}}
      >>> spec = {"blocks": {"w": P("pipe")}}
      >>> float(tx.testing.run_sharded(loss, params, np.ones(4, np.float32), axes={"pipe": 2},
      ...                              in_specs=(spec, P()), out_specs=P()))
      6.0
    """
    op = "pipeline.evaluate"

    def wrapped(params: Any, batch: Any, mask: Any = None) -> Any:
        where, functions = find_route(op, schedule, axis), (first, block, last)
        if where.axis is None:
            return one_stage.evaluate(
                *(op, functions, where, params, batch, mask), has_aux=has_aux, data_axis=data_axis
            )
        plan, pipe = where.schedule, where.axis
        inputs = check_inputs(op, plan, params, batch, mask, pipe, data_axis)
        stages = prepare_stages(op, functions, inputs, has_aux=has_aux)
        sizes = {"stages": plan.stages, "microbatches": plan.microbatches}
        forward = make_schedule("gpipe", **sizes, chunks=plan.chunks)
        rows = make_rows(forward, plan_buffers(forward), inputs.stage)
        rows = slice_rows(rows, used_ticks(forward.forward))
        final = forward.stages * forward.chunks - 1
        ring = forward.chunks > 1

        def body(carry: Carry, rows: dict[str, Row]) -> tuple[Carry, None]:
            turn, received = take_turn(inputs, forward, rows["F"]), carry["activation"]

            def run() -> Carry:
                x = stages.run_if(
                    turn.stage == 0,
                    lambda: stages.first(inputs.ends, turn.microbatch),
                    lambda: received,
                )
                y = stages.block(turn.chunk, x, turn.microbatch, turn.stage)
                means = stages.run_if(
                    turn.stage == final,
                    lambda: _add_means(stages, inputs, carry, turn, y),
                    lambda: carry["means"],
                )
                return {"activation": y, "means": means}

            carry = stages.run_if(turn.is_mine, run, lambda: carry)
            sent = shift(carry["activation"], pipe, 1, wrap=ring, name="activations")
            return {**carry, "activation": sent}, None

        carry = lax.scan(body, {"activation": stages.x, "means": stages.means}, rows)[0]
        loss, aux = _sum_over_stages(carry["means"], {}, pipe)[0]
        return (loss, aux) if has_aux else loss

    return wrapped
