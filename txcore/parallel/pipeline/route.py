"""Where a pipeline runs: along which axis and by which schedule, or on one stage."""

from typing import Any, NamedTuple

from txcore.collectives import axis_size
from txcore.parallel.pipeline.making import make_schedule
from txcore.parallel.pipeline.schedule import Schedule
from txcore.step_scope import StepScope, current_scope


class Route(NamedTuple):
    """Hold where a pipeline runs.

    Attributes:
      axis: the pipe axis; None where all layers are on one device.
      schedule: its schedule; of one stage, its microbatches and chunks alone count.
    """

    axis: str | None
    schedule: Any


def find_route(op: str, schedule: Schedule | None, axis: str | None) -> Route:
    """Return where a pipeline runs, by what it is given or else by the step's plan.

    Raises:
      ValueError: nobody says; or the schedule is of other chunks than the layers are stored in.
    """
    scope = current_scope()
    if scope is not None:
        return _find_in_step(op, schedule, axis, scope)
    if schedule is None or axis is None:
        raise ValueError(
            f"tx.{op} needs schedule= and axis= outside a step decorated with @tx.step_fn (inside "
            f"one they are the plan's), got schedule={schedule and schedule.name!r} and "
            f"axis={axis!r}"
        )
    return Route(axis, schedule)


def _find_in_step(op: str, schedule: Schedule | None, axis: str | None, scope: StepScope) -> Route:
    pipeline = scope.pipeline
    if pipeline is None and axis is not None and axis not in scope.left_out:
        raise ValueError(
            f"tx.{op} needs a plan with a pipeline, in whose parts parameters are stored, to run "
            f"along axis {axis!r}, got one without: write tx.Plan(pipeline=tx.PP({axis!r}, "
            "microbatches=...)), and leave schedule= and axis= out"
        )
    own = axis if pipeline is None else pipeline.axis
    if axis is not None and axis != own:
        raise ValueError(
            f"tx.{op} needs axis= that of the plan's pipeline, {own!r}, or none, got {axis!r}"
        )
    alone = own is None or own in scope.left_out
    chunks = 1 if pipeline is None else pipeline.chunks
    if schedule is None and pipeline is not None:
        schedule = pipeline.make_schedule(_count_stages(own, alone))
    elif schedule is None:
        schedule = make_schedule("gpipe", stages=1, microbatches=1)
    if schedule.chunks != chunks:
        raise ValueError(
            f"tx.{op} needs a schedule of {chunks} chunks a stage, in which the plan stores the "
            f"layers, got {schedule.name!r} of {schedule.chunks}: write PP(..., "
            f"chunks={schedule.chunks})"
        )
    return Route(None if alone else own, schedule)


def _count_stages(axis: Any, alone: bool) -> int:
    return 1 if alone else axis_size(axis)
