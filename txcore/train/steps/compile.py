"""From a step function to a checked, compiled program for one mesh, plan and batch shape."""

import functools
import hashlib
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from txcore import _compat, varying
from txcore.collectives._leaves import names_of
from txcore.launch import preflight
from txcore.layout import shape_of_part
from txcore.mesh import MeshSpec
from txcore.plan.plan import Plan
from txcore.printing import name_of
from txcore.step_scope import StepScope, tracing
from txcore.train.batches.batch import batch_size_and_mask, mask_of
from txcore.train.state.layout import state_specs
from txcore.train.state.owner import TracedOwner
from txcore.train.state.state import TrainState
from txcore.train.steps import refusals
from txcore.train.steps.means import find_other_weights
from txcore.train.steps.outputs import check_metrics_alone, check_train_output, count_examples

if TYPE_CHECKING:
    from txcore.profiling.declared.collectives import Declared
    from txcore.profiling.program import Program


@dataclass(frozen=True)
class CompiledStep:
    """A compiled step, with all that led to it, and what compiling took.

    Attributes:
      program: the program and its stages.
      seconds: of tracing and compiling.
      name: the step's.
      last_words: what a rank that waits in it says: the step's name and its last collective.
      reduces: whether it has any collective, for which all ranks have to come.
      weighed: what an evaluation's means weigh by, if that is not the real examples of a batch.
      activation: the type of what the stages of its pipeline send; None without one.
      steps: how many steps a call makes.
      step_jaxpr: the traced program of one of them.
    """

    program: "Program"
    seconds: float
    name: str
    last_words: str
    reduces: bool
    weighed: str | None = None
    activation: Any = None
    steps: int = 1
    step_jaxpr: Any = None

    @functools.cached_property
    def call(self) -> jax.stages.Compiled:
        """The compiled function."""
        return self.program.compiled


def compile_step(
    fn: Callable[..., Any],
    state: TrainState,
    batch: Any,
    *,
    mesh: MeshSpec,
    plan: Plan,
    options: dict[str, Any],
    train: bool,
    together: bool = False,
    many: bool = False,
    keep_partitioned: bool = False,
) -> CompiledStep:
    """Check and compile a step, as a function of the state's arrays and the batch.

    To train, `fn(state, batch) -> (state, metrics)` becomes a program that returns the new
    arrays and the metrics, and whose state is donated. Else `fn(state, batch) -> metrics`
    becomes one that returns the metrics and the number of real examples (None without a mask).
    With `together` every process of the run compiles it now, and all compare what it is. With
    `many` the batch is stacked: one step for each index of its first dim, in one program, which
    returns the metrics stacked. With `keep_partitioned` the program has its module right after SPMD
    partitioning.
    """
    # Imported when first needed: the audit's readers would be a third of `import txcore`.
    from txcore.profiling.declared.collectives import list_declared
    from txcore.profiling.program import compile_lowered

    data_axes = plan.active_data_axes(mesh)
    row_axes = tuple(axis for axis in plan.row_axes if axis in data_axes)
    left_out = frozenset(a for a, n in mesh.shape.items() if n == 1)
    scales_loss = state.precision.scaling is not None
    layouts = plan.layouts(state.stored_params, mesh)
    kept = plan.kept(state.stored_params, mesh, state.engine.optimizer)
    specs = state_specs(state.arrays, layouts, kept)

    # jax's caches keep the structure of what a program is given for ever. So it is given the
    # state's arrays alone, and what it traces does not keep the engine alive.
    owner = TracedOwner(state.engine)
    weighed: list[str | None] = []
    activations: list[Any] = []

    dp = plan.data_parallel
    pairs = list(zip(jax.tree.leaves(state.stored_params), jax.tree.leaves(layouts), strict=True))
    shapes = tuple(shape_of_part(x.shape, layout.view, mesh.shape) for x, layout in pairs)
    parts = tuple(shape_of_part(x.shape, layout.gradient, mesh.shape) for x, layout in pairs)

    def sharded(arrays: dict[str, Any], batch: Any) -> Any:
        rows = batch_size_and_mask(batch, plan)[0]
        scope = StepScope(
            *(data_axes, row_axes, left_out, rows, scales_loss, layouts, shapes, parts),
            regathers=dp is None or dp.reshard_after_forward,
            shards_gradients=dp is not None and dp.shard in ("gradients", "parameters"),
            sync_options=plan.sync_options,
            pipeline=plan.pipeline,
            rounds=plan.rounds(mesh) if train else None,
        )
        with tracing(scope):
            activations.append(scope.activations)
            before = TrainState(**arrays, owner=owner)
            out = fn(before, batch)
            if train:
                return check_train_output(fn, before, out, specs)
            metrics = check_metrics_alone(fn, out)
            mask = None if "mask" in plan.batch else mask_of(batch)
            weighed.append(find_other_weights(metrics, scope.weighed, mask))
            return metrics, count_examples(batch, plan, row_axes, metrics)

    sharded.__name__ = name_of(fn)  # the HLO module's name
    started = time.perf_counter()
    steps = jax.tree.leaves(batch)[0].shape[0] if many else 1
    batch = jax.tree.map(partial(_shape_of_step, many), batch)
    batch_specs = plan.batch_specs(batch, mesh)
    batch = jax.tree.map(partial(_shape_on, mesh), batch, batch_specs)
    mapped = jax.shard_map(
        sharded,
        mesh=mesh.mesh,
        in_specs=(specs, batch_specs),
        out_specs=(specs, P()) if train else P(),
    )
    traced = jax.jit(mapped, donate_argnums=(0,) if train else ()).trace(state.arrays, batch)
    jaxpr = _compat.plain_jaxpr(traced.jaxpr)
    declared = list_declared(jaxpr)
    _check_reductions(jaxpr, declared, mesh, data_axes)
    _check_predicates(jaxpr)
    _warn_of_shared_draws(fn, jaxpr, data_axes)
    if train and scales_loss:
        _check_scaled(fn, jaxpr, (state.arrays, batch), traced.out_info)
    step_jaxpr = jaxpr
    if many:  # of steps that were checked, one after the other
        traced, batch = _trace_steps(
            sharded, state.arrays, batch, mesh, (specs, batch_specs), steps
        )
        jaxpr = _compat.plain_jaxpr(traced.jaxpr)
        declared = list_declared(jaxpr)
    collectives = _list_lines(declared)
    lowered = traced.lower()
    if together:
        facts = preflight.facts_of(mesh.mesh, (state.arrays, batch), collectives)
        preflight.check(name_of(fn), {**facts, "StableHLO": _digest_program(lowered)})
    program = compile_lowered(jaxpr, lowered, options, keep_partitioned=keep_partitioned)
    last = f", whose last collective is {collectives[-1]}" if collectives else ""
    seconds, name = time.perf_counter() - started, name_of(fn)
    other = weighed[-1] if weighed else None
    sent = activations[-1][-1] if activations and activations[-1] else None
    return CompiledStep(
        *(program, seconds, name, name + last, bool(collectives), other, sent),
        steps=steps,
        step_jaxpr=step_jaxpr,
    )


def _trace_steps(
    step: Callable[..., Any],
    arrays: dict[str, Any],
    batch: Any,
    mesh: MeshSpec,
    specs: tuple[Any, Any],
    steps: int,
) -> tuple[Any, Any]:
    """Trace several steps as one program; return it, and the shapes of the stacked batches."""

    def run_steps(arrays: dict[str, Any], batches: Any) -> Any:
        return lax.scan(step, arrays, batches)

    run_steps.__name__ = f"{step.__name__}_{steps}_times"
    over = jax.tree.map(lambda spec: P(None, *spec), specs[1], is_leaf=_is_spec)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((steps, *x.shape), x.dtype), batch)
    batches = jax.tree.map(partial(_shape_on, mesh), shapes, over)
    mapped = jax.shard_map(
        run_steps, mesh=mesh.mesh, in_specs=(specs[0], over), out_specs=(specs[0], P())
    )
    return jax.jit(mapped, donate_argnums=0).trace(arrays, batches), batches


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _shape_of_step(many: bool, leaf: Any) -> Any:
    """Return the shape of a batch's leaf; of a stacked one, that of a single step's."""
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if many else leaf


def _shape_on(mesh: MeshSpec, leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
    """Return the shape of a leaf that lies as the plan says; its own spec may say it otherwise."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mesh.sharding(*spec))


def _list_lines(declared: Iterable["Declared"]) -> list[str]:
    """Return a line for each collective of the traced step, in order."""
    return [
        f"{made.tag or made.primitive} over {names_of(made.axes)}, {made.elements} elements "
        f"({made.source})"
        for made in declared
        if made.live
    ]


def _digest_program(lowered: jax.stages.Lowered) -> str:
    """Return a digest of the whole program: its constants and branches have to be the same too."""
    return f"sha256 {hashlib.sha256(lowered.as_text().encode()).hexdigest()}"


def _check_reductions(
    jaxpr: Any, declared: Iterable["Declared"], mesh: MeshSpec, data_axes: tuple[str, ...]
) -> None:
    """Refuse the reductions and results that types cannot tell to be wrong."""
    from txcore.profiling.declared.gathered_sums import find_wrong_reductions  # as in compile_step

    findings = find_wrong_reductions(jaxpr)
    refusals.check_reductions(findings, jaxpr, mesh)
    _check_summed(jaxpr, declared, data_axes)
    refusals.check_totals(findings, mesh)


def _check_summed(jaxpr: Any, declared: Iterable["Declared"], data_axes: tuple[str, ...]) -> None:
    """Refuse gradients that autodiff has summed over the devices already."""
    from txcore.profiling.declared.summed_gradients import (
        find_summed_gradients,  # as in compile_step
    )

    sums = [made for made in declared if made.live and made.primitive == "psum_invariant"]
    if not any(made.autodiff or (made.tag or "").startswith("vary") for made in sums):
        return
    for found in find_summed_gradients(jaxpr, data_axes):
        inside = " (a cast inside of what is differentiated)"
        cast = "" if found.tag is None else f", the transpose of {found.tag}{inside}"
        raise ValueError(
            f"autodiff put a psum of {found.elements} elements over axis {found.axis!r} into the "
            f"backward pass ({found.source}){cast}: what is differentiated there does not vary "
            "along it, so that its gradient comes out summed over the devices, not as their mean. "
            "Differentiate state.params in place of state.stored_params, and reduce the gradients "
            "yourself: loss, grads = tx.value_and_grad(loss_of)(state.params); grads, state = "
            "state.sync_gradients(grads). (tx.value_and_grad casts other arguments too; "
            "jax.value_and_grad does not)"
        )


def _warn_of_shared_draws(fn: Callable[..., Any], jaxpr: Any, data_axes: tuple[str, ...]) -> None:
    """Warn of random numbers for local examples that each device draws as the others do."""
    from txcore.profiling.declared.shared_draws import find_shared_draws  # as above

    for draw in find_shared_draws(jaxpr, data_axes):
        where = f"{draw.source}, in {draw.inside}" if draw.inside else draw.source
        warnings.warn(
            f"{name_of(fn)} draws random numbers of shape {draw.shape} for its examples ({where}) "
            f"from a key that is the same on every device along axis {draw.axis!r}: each device "
            "gets the same ones, such as one dropout mask for the examples of all. Give each "
            "example a key, of keys = state.example_keys(batch) (the same numbers under every "
            "plan), or draw from state.device_key() in place of state.key (docs/models.md)",
            stacklevel=2,
        )


def _check_predicates(jaxpr: Any) -> None:
    """Refuse what hangs or lies where devices branch or loop differently."""
    from txcore.profiling.declared.divergence import find_divergences  # as above

    for found in find_divergences(jaxpr):
        if found.problem == "lies":
            raise ValueError(
                f"{found}: the devices hold different values, and gradients through it come out "
                f"wrong. Cast what goes in first: tx.vary(x, {found.axis!r}) of each operand or "
                "initial value that the output is made of"
            )
        whom = "all devices" if found.kind == "collective-permute" else "all devices of its group"
        raise ValueError(
            f"{found}: {whom} would wait for those that do not come. Compute it on every device "
            "and select with jax.numpy.where (or jax.lax.select), or make the predicate the same "
            f"on every device first: tx.pmax(predicate, {found.axis!r})"
        )


# Where they lie in what a compiled step is given and returns, (arrays, batch or metrics).
_PARAMS = (SequenceKey(0), DictKey("stored_params"))
_SCALE = (SequenceKey(0), DictKey("loss_scaling"), GetAttrKey("scale"))


def _check_scaled(fn: Callable[..., Any], jaxpr: Any, given: Any, returned: Any) -> None:
    """Refuse a float16 step that makes parameters of gradients that were never scaled."""
    inputs, outputs = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (given, returned))
    made = [path[:2] == _PARAMS for path, _ in outputs]
    computes, used = varying.inputs_needed_by(jaxpr, made)
    scaled = any(u and path == _SCALE for (path, _), u in zip(inputs, used, strict=True))
    if computes and not scaled:
        raise ValueError(
            f"{name_of(fn)} computes in float16, but state.loss_scale had no part in its new "
            "parameters: gradients below 6e-8 came out as zeros. Write loss, grads = "
            "tx.value_and_grad(loss_of, loss_scale=state.loss_scale)(state.params); the same line "
            "works in every precision"
        )
