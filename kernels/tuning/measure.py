"""The time of each candidate for a problem, measured side by side."""

import concurrent.futures
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from txcore.kernels.common.compiler_options import compiler_options
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.dispatch.tuned import fields_of
from txcore.kernels.dispatch.tuning_file import Entry, label_candidate
from txcore.kernels.tuning import timing
from txcore.kernels.tuning.shapes import OPS, Shape


@dataclass(frozen=True)
class Measured:
    """Hold the measurements of one problem.

    Attributes:
      key: the key of the problem's class.
      microseconds: label -> the median time of one call, for each candidate that ran.
      failed: label -> why it did not run, for the others.
      entry: the fastest compiled candidate, for a tuning file; None where there is none.
    """

    key: str
    microseconds: Mapping[str, float]
    failed: Mapping[str, str] = field(default_factory=dict)
    entry: Entry | None = None


def measure_shape(
    shape: Shape,
    dtype: Any,
    *,
    backward: bool = True,
    rounds: int = 7,
    named: Sequence[str] | None = None,
) -> Measured:
    """Time every candidate for a named shape on the default device.

    Args:
      shape: what to compute.
      dtype: of its floating-point operands.
      backward: whether to compute the gradients too.
      rounds: how often each candidate is timed.
      named: the implementations to time, interpreted ones too; None for all that are compiled.

    Returns:
      The times. Nothing is written.
    """
    problem, kernels = problem_of(shape, dtype)
    choices = {
        label_candidate(choice.implementation, fields_of(choice.config)): choice
        for choice in registry.list_candidates(problem, kernels, named)
    }
    calls, failed = compile_calls(shape, dtype, choices, backward=backward)
    times = timing.time_calls(calls, rounds)
    able = [n for n in times if registry.is_compiled(problem, choices[n].implementation)]
    if not able:
        return Measured(problem.key, times, failed)
    best = choices[min(able, key=times.__getitem__)]
    rounded = {name: float(f"{time:.4g}") for name, time in times.items()}
    config = fields_of(best.config)
    entry = Entry(best.implementation, config, rounded, jax.__version__, describe_machine())
    return Measured(problem.key, times, failed, entry)


def problem_of(shape: Shape, dtype: Any) -> tuple[Problem, registry.Kernels]:
    """Return the problem that the registry sees for a shape, and the op's implementations.

    Args:
      shape: what to compute.
      dtype: of its floating-point operands.
    """
    asked: list[tuple[Problem, registry.Kernels]] = []

    def choose_xla(problem: Problem, kernels: registry.Kernels) -> registry.Choice:
        asked.append((problem, kernels))
        return registry.Choice("xla", kernels["xla"].configs(problem)[0], "given")

    with registry.decided_by(choose_xla):
        # A new function object, since jax would not trace the shape's method a second time.
        jax.eval_shape(lambda *operands: shape.call_op(*operands), *shape.make_structs(dtype))
    return next(one for one in asked if one[0].op == shape.op)


def compile_calls(
    shape: Shape,
    dtype: Any,
    choices: Mapping[str, registry.Choice],
    *,
    backward: bool,
    operands: Sequence[jax.Array] | None = None,
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Compile a call of each choice, in several threads, and run it once.

    Args:
      shape: what to compute.
      dtype: of its floating-point operands.
      choices: name -> what runs the op.
      backward: as for `compile_call`.
      operands: the op's operands; None makes them.

    Returns:
      name -> call, for those that ran, and name -> reason, for those that failed.
    """
    made = shape.make_operands(dtype) if operands is None else operands

    def compile_one(choice: registry.Choice) -> Callable[[], object] | str:
        try:
            return compile_call(shape, dtype, choice, backward=backward, operands=made)
        except Exception as error:  # of any kind, from a compiler or a kernel: time the others
            return f"{type(error).__name__}: {error}"

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = dict(zip(choices, pool.map(compile_one, choices.values()), strict=True))
    failed = {name: call for name, call in compiled.items() if isinstance(call, str)}
    calls = {name: call for name, call in compiled.items() if not isinstance(call, str)}
    for name, call in list(calls.items()):
        try:
            call()
        except Exception as error:  # seen only when it runs: too little memory, a bad address
            failed[name] = f"{type(error).__name__}: {error}"
            del calls[name]
    return calls, failed


def compile_call(
    shape: Shape,
    dtype: Any,
    choice: registry.Choice | None,
    *,
    backward: bool,
    operands: Sequence[jax.Array] | None = None,
) -> Callable[[], object]:
    """Compile a call of an op, for `alternate` to time.

    Args:
      shape: what to compute.
      dtype: of its floating-point operands.
      choice: the implementation and configuration; None for what the registry chooses.
      backward: whether to compute the gradients of the operands too, in one program with the
        results. The gradient of the results is an argument, so that XLA cannot simplify by it. An
        update has no gradients.
      operands: the op's operands, which are not changed; None makes them.

    Returns:
      A function that runs it once, and waits for the end.
    """
    given = shape.make_operands(dtype) if operands is None else operands
    replaced = OPS[shape.op].updates
    operands = [jnp.array(x) if i in replaced else x for i, x in enumerate(given)]
    forward, forward_and_backward = write_programs(shape, choice)
    options = compiler_options(jax.default_backend(), jnp.dtype(dtype).name)
    if backward and shape.differentiable:
        gradient = jax.tree.map(
            lambda out: jnp.linspace(-1, 1, out.size, dtype=out.dtype).reshape(out.shape),
            jax.eval_shape(forward, *operands),
        )
        jitted = jax.jit(forward_and_backward, compiler_options=options)
        with_gradients = jitted.lower(gradient, *operands).compile()
        return lambda: jax.block_until_ready(with_gradients(gradient, *operands))
    jitted = jax.jit(forward, donate_argnums=replaced, compiler_options=options)
    compiled = jitted.lower(*operands).compile()
    if not replaced:
        return lambda: jax.block_until_ready(compiled(*operands))

    def update_in_place() -> None:
        for place, result in zip(replaced, jax.block_until_ready(compiled(*operands)), strict=True):
            operands[place] = result

    return update_in_place


def write_programs(
    shape: Shape, choice: registry.Choice | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return functions that compute an op, and an op with its gradients.

    Args:
      shape: what to compute.
      choice: as for `compile_call`.

    Returns:
      `forward(*operands)` and `forward_and_backward(gradients of the results, *operands)`.
    """

    def forward(*operands: jax.Array) -> Any:
        with registry.decided_by(lambda problem, _: choice if problem.op == shape.op else None):
            return shape.call_op(*operands)

    def forward_and_backward(gradient: Any, *operands: jax.Array) -> Any:
        def of_differentiable(*some: jax.Array) -> Any:
            given = dict(zip(shape.differentiable, some, strict=True))
            return forward(*(given.get(i, x) for i, x in enumerate(operands)))

        # By vjp, not as the gradient of a sum: the time of that sum is not the op's.
        results, transpose = jax.vjp(
            of_differentiable, *(operands[i] for i in shape.differentiable)
        )
        return results, transpose(gradient)

    return forward, forward_and_backward


def describe_machine() -> str:
    """Name the default device: for a CPU, its model and the cores that this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{next(models, 'a CPU')}, {cores} cores"
