"""A step compiled for its proof: here, or for a machine that need not be here."""

from typing import TYPE_CHECKING, Any

import jax

from txcore import _compat
from txcore.printing import name_of
from txcore.train.batches.batch import global_shapes
from txcore.train.options import Options
from txcore.train.state.layout import place_shapes, state_specs
from txcore.train.state.owner import Owner
from txcore.train.state.state import TrainState
from txcore.train.steps.compile import CompiledStep, compile_step
from txcore.train.steps.step_fn import check_jit, function_of
from txcore.train.steps.steps import Steps

if TYPE_CHECKING:
    from txcore.profiling import Report
    from txcore.profiling.targets import Target


def compile_here(
    steps: Steps, step: Any, state: TrainState, batch: Any, per_call: int | None
) -> tuple[CompiledStep, TrainState]:
    """Return a step, or so many in one program, as it runs here, and a state that it takes."""
    placed = steps.place(batch) if per_call is None else steps.stack([batch] * per_call)
    assert placed is not None, "a batch is like itself"
    state, compiled = steps.compile(step, state, placed, train=True)
    return compiled, state


def compile_there(
    options: Options,
    owner: Owner,
    machine: "Target",
    step: Any,
    state: TrainState,
    batch: Any,
    per_call: int | None,
) -> tuple[CompiledStep, TrainState]:
    """Compile a step for another machine; return it, and the shapes of a state that it takes.

    Args:
      options: those of an engine on that machine's mesh.
      owner: that engine's.
      machine: the target.
      step: the training step.
      state: a state of an engine here; its shapes are taken.
      batch: arrays or shapes of one data shard.
      per_call: how many steps there are in one program; None for one without a loop.
    """
    check_jit(name_of(step))
    plan, params = options.plan, state.stored_params
    kept = plan.kept(
        params, options.mesh, options.optimizer
    )  # of as many devices as the target has
    arrays = {**state.arrays, "comm_state": kept}
    specs = state_specs(arrays, plan.layouts(params, options.mesh), kept)
    state = TrainState(**place_shapes(arrays, options.mesh, specs), owner=owner)
    shapes = global_shapes(batch, options.mesh, options.plan)
    if per_call is not None:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((per_call, *x.shape), x.dtype), shapes)
    with _compat.no_persistent_cache():  # which would not read back what it wrote
        compiled = compile_step(
            function_of(step),
            state,
            shapes,
            mesh=options.mesh,
            plan=options.plan,
            options={**options.xla_options, **machine.compiler_options},
            train=True,
            many=per_call is not None,
            keep_partitioned=machine.rewrites_collectives,
        )
    return compiled, state


def report_on(compiled: CompiledStep, state: TrainState, options: Options) -> "Report":
    """Return the report of a compiled step, against the plan where it predicts the gradients."""
    # Not needed to train: see compile.py.
    from txcore.profiling.audit import audit_program
    from txcore.profiling.declared.gradient_factors import read_gradient_factors
    from txcore.profiling.matching.against_plan import against_plan

    report = audit_program(compiled.program)
    if options.optimizer.per_example:  # gathers what the plan would have averaged
        return report
    factors = read_gradient_factors(compiled.step_jaxpr, options.plan.data_axes)
    clips, skips = options.optimizer.clips, state.loss_scaling is not None
    predicted = options.plan.predict(
        state.stored_params,
        options.mesh,
        clips=clips,
        skips=skips,
        exchanges=options.optimizer.exchanges,
        activation=compiled.activation,
    )
    return against_plan(report, predicted, factors, steps=compiled.steps)
