"""Run a pipeline inside `shard_map`: value_and_grad by a schedule, and evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore.collectives import psum, shift
from txcore.parallel.pipeline.buffers import plan_buffers
from txcore.parallel.pipeline.inputs import Axis, Inputs, check_inputs
from txcore.parallel.pipeline.making import make_schedule
from txcore.parallel.pipeline.passes import Carry, Runner, Turn, take_turn
from txcore.parallel.pipeline.programs import StageProgram, trace_stage
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
    schedule: Schedule,
    *,
    axis: str,
    data_axis: Axis | None = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Differentiate a model whose layers lie on the devices along an axis, in microbatches.

    Stands in the place of `tx.value_and_grad`, inside `shard_map`. The batch is split into
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
      schedule: of as many stages as `axis` has devices. A schedule with weight passes ("zb-h1")
        defers the gradients of those parameters whose equations stand by themselves: write the
        layers of a chunk as a Python loop, since a `lax.scan` makes all its gradients at once.
      axis: the pipe axis.
      data_axis: the axes that the batch is sharded over; inside a step they are the plan's.
      has_aux: whether `last` returns `(losses, aux)`, with aux a pytree of arrays of shape
        (examples, ...), numbers of each example that are averaged as the losses are.

    Returns:
      A function of (params, batch, mask=None) that returns `(loss, gradients)`, or `((loss, aux),
      gradients)`. `params` is a dict with "blocks", each leaf (chunks, 1, ...) on a device (global
      (chunks, stages, ...), spec `P(None, axis)`), and the other parameters, whole on each.
      `batch` is the same along the pipe axis. `mask`, of the losses' shape, is 0 for what does not
      count: then the mean is that over all others of the global batch. The gradients lie as the
      parameters do, those of "blocks" each device's own and the others summed over the pipe axis;
      all vary along the data axes.

    Raises:
      ValueError: the schedule has another number of stages, the microbatches do not divide the
        batch, parameters or batch lie otherwise, `first` and `block` return different types, a
        function communicates over the pipe axis, the losses are reduced already, or the step is in
        float16.
      TypeError: parameters or losses are not floating point, or params is no dict with "blocks".

    Example:
      >>> schedule = tx.pipeline.make_schedule("1f1b", stages=2, microbatches=2)
      >>> both = tx.pipeline.value_and_grad(
      ...     lambda params, batch: batch,
      ...     lambda params, x, batch, stage: x * params["w"][0],
      ...     lambda params, x, batch: x,
      ...     schedule, axis="pipe")
      >>> params = {"blocks": {"w": np.float32([[[2.0], [3.0]]])}}
      >>> spec = {"blocks": {"w": P(None, "pipe")}}
      >>> loss, grads = tx.testing.run_sharded(
      ...     both, params, np.ones(4, np.float32), axes={"pipe": 2}, in_specs=(spec, P()),
      ...     out_specs=(P(), spec))
      >>> print(loss, grads["blocks"]["w"].tolist())
      6.0 [[[3.0], [2.0]]]

    References:
      As `make_schedule`. Chen et al., "Training deep nets with sublinear memory cost", 2016.
    """

    def wrapped(params: Any, batch: Any, *, mask: Any = None) -> Any:
        op = "pipeline.value_and_grad"
        scope = current_scope()
        if scope is not None and scope.scales_loss:
            raise ValueError(
                f"tx.{op} needs a step in float32 or bfloat16, got one in float16: it does not "
                "scale the loss, and gradients below 6e-8 would come out as zeros"
            )
        inputs = check_inputs(op, schedule, params, batch, mask, axis, data_axis)
        stages = prepare_stages(op, (first, block, last), inputs, has_aux=has_aux)
        program = _trace_block(schedule, inputs, stages)
        run = Runner(schedule, plan_buffers(schedule), inputs, stages, program)
        carry, rows = run.start(), make_rows(schedule, run.buffers, inputs.stage)
        for segment in cut_ticks(schedule):

            def body(carry: Carry, row: dict[str, Row], segment: Segment = segment) -> Any:
                return run.tick(carry, row, segment), None

            carry, _ = lax.scan(body, carry, slice_rows(rows, segment.ticks))
        # Every device adds zeros, but the first and the last.
        loss, aux = psum(carry["means"], axis, name="loss")
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), carry["ends"], inputs.ends)
        grads = psum(grads, axis, name="grads")
        of_blocks = jax.tree.map(
            lambda g, p: g.astype(p.dtype)[:, None], carry["blocks"], inputs.blocks
        )
        return ((loss, aux) if has_aux else loss), {**grads, "blocks": of_blocks}

    return wrapped


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
    schedule: Schedule,
    *,
    axis: str,
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
      over the data axes.

    Raises:
      ValueError, TypeError: as `value_and_grad`.

    Example:
      >>> schedule = tx.pipeline.make_schedule("1f1b", stages=2, microbatches=2)
      >>> loss = tx.pipeline.evaluate(
      ...     lambda params, batch: batch,
      ...     lambda params, x, batch, stage: x * params["w"][0],
      ...     lambda params, x, batch: x,
      ...     schedule, axis="pipe")
      >>> params = {"blocks": {"w": np.float32([[[2.0], [3.0]]])}}
      >>> spec = {"blocks": {"w": P(None, "pipe")}}
      >>> float(tx.testing.run_sharded(loss, params, np.ones(4, np.float32), axes={"pipe": 2},
      ...                              in_specs=(spec, P()), out_specs=P()))
      6.0
    """

    def wrapped(params: Any, batch: Any, *, mask: Any = None) -> Any:
        op = "pipeline.evaluate"
        inputs = check_inputs(op, schedule, params, batch, mask, axis, data_axis)
        stages = prepare_stages(op, (first, block, last), inputs, has_aux=has_aux)
        sizes = {"stages": schedule.stages, "microbatches": schedule.microbatches}
        forward = make_schedule("gpipe", **sizes, chunks=schedule.chunks)
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
            sent = shift(carry["activation"], axis, 1, wrap=ring, name="activations")
            return {**carry, "activation": sent}, None

        carry = lax.scan(body, {"activation": stages.x, "means": stages.means}, rows)[0]
        loss, aux = psum(carry["means"], axis, name="loss")
        return (loss, aux) if has_aux else loss

    return wrapped
