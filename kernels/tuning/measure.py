"""The time that each candidate for a problem takes, measured one beside the other."""

import concurrent.futures
import os
import pathlib
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from txcore.kernels.common.compiler_options import compiler_options
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.dispatch.tuned import fields_of
from txcore.kernels.dispatch.tuning_file import Entry, label
from txcore.kernels.tuning.shapes import OPS, Shape

_LEAST_SECONDS = 0.01  # of one round of one candidate: what the clock and the queue cost is less


@dataclass(frozen=True)
class Measured:
    """Hold what was measured of one problem.

    Attributes:
      key: of the problem's class.
      microseconds: the median time of one call of each candidate that ran, by its label.
      failed: why the others did not, by their labels.
      entry: the fastest one that is compiled, for a tuning file; None where there is none.
    """

    key: str
    microseconds: Mapping[str, float]
    failed: Mapping[str, str] = field(default_factory=dict)
    entry: Entry | None = None


def measure(
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
      backward: whether to compute the gradients, too.
      rounds: how often each candidate has its turn.
      named: the implementations to time, interpreted ones too; None for all that are compiled.

    Returns:
      The times. Nothing is written.
    """
    problem, kernels = problem_of(shape, dtype)
    choices = {
        label(choice.implementation, fields_of(choice.config)): choice
        for choice in registry.candidates(problem, kernels, named)
    }
    calls, failed = compile_calls(shape, dtype, choices, backward=backward)
    times = time_calls(calls, rounds)
    able = [n for n in times if registry.is_compiled(problem, kernels, choices[n].implementation)]
    if not able:
        return Measured(problem.key, times, failed)
    best = choices[min(able, key=times.__getitem__)]
    rounded = {name: float(f"{time:.4g}") for name, time in times.items()}
    config = fields_of(best.config)
    entry = Entry(best.implementation, config, rounded, jax.__version__, machine())
    return Measured(problem.key, times, failed, entry)


def problem_of(shape: Shape, dtype: Any) -> tuple[Problem, registry.Kernels]:
    """Return what the registry is asked for a shape, and the op's implementations.

    Args:
      shape: what to compute.
      dtype: of its floating-point operands.
    """
    asked: list[tuple[Problem, registry.Kernels]] = []

    def decide(problem: Problem, kernels: registry.Kernels) -> registry.Choice:
        asked.append((problem, kernels))
        return registry.Choice("xla", kernels["xla"].configs(problem)[0], "given")

    with registry.decided_by(decide):
        # A function of its own, as jax would not trace the shape's method again.
        jax.eval_shape(lambda *operands: shape.call(*operands), *shape.structs(dtype))
    return next(one for one in asked if one[0].op == shape.op)


def compile_calls(
    shape: Shape,
    dtype: Any,
    choices: Mapping[str, registry.Choice],
    *,
    backward: bool,
    operands: Sequence[jax.Array] | None = None,
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Compile a call of each choice, several at a time, and run it once.

    Args:
      shape: what to compute.
      dtype: of its floating-point operands.
      choices: what runs the op, by name.
      backward: as for `compile_call`.
      operands: what to compute with; None makes them.

    Returns:
      The calls, and why the others failed, by name.
    """
    made = shape.operands(dtype) if operands is None else operands

    def compile_one(choice: registry.Choice) -> Callable[[], object] | str:
        try:
            return compile_call(shape, dtype, choice, backward=backward, operands=made)
        except Exception as error:  # a compiler's or a kernel's own: the others are timed
            return f"{type(error).__name__}: {error}"

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = dict(zip(choices, pool.map(compile_one, choices.values()), strict=True))
    failed = {name: call for name, call in compiled.items() if isinstance(call, str)}
    calls = {name: call for name, call in compiled.items() if not isinstance(call, str)}
    for name, call in list(calls.items()):
        try:
            call()
        except Exception as error:  # what only running shows: too little memory, a wrong address
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
        results, from a gradient of the results that is no constant. An update has none.
      operands: what to compute with, kept as it is; None makes them.

    Returns:
      A function that runs it once, and waits for the end.
    """
    given = shape.operands(dtype) if operands is None else operands
    replaced = OPS[shape.op].updates
    operands = [jnp.array(x) if i in replaced else x for i, x in enumerate(given)]

    def forward(*operands: jax.Array) -> Any:
        with registry.decided_by(lambda problem, _: choice if problem.op == shape.op else None):
            return shape.call(*operands)

    def both(gradient: Any, *operands: jax.Array) -> Any:
        def of_differentiable(*some: jax.Array) -> Any:
            given = dict(zip(shape.differentiable, some, strict=True))
            return forward(*(given.get(i, x) for i, x in enumerate(operands)))

        # Not the gradient of a sum, whose own time is not the op's.
        results, transpose = jax.vjp(
            of_differentiable, *(operands[i] for i in shape.differentiable)
        )
        return results, transpose(gradient)

    options = compiler_options(jax.default_backend())
    if backward and shape.differentiable:
        gradient = jax.tree.map(
            lambda out: jnp.linspace(-1, 1, out.size, dtype=out.dtype).reshape(out.shape),
            jax.eval_shape(forward, *operands),
        )
        jitted = jax.jit(both, compiler_options=options)
        with_gradients = jitted.lower(gradient, *operands).compile()
        return lambda: jax.block_until_ready(with_gradients(gradient, *operands))
    jitted = jax.jit(forward, donate_argnums=replaced, compiler_options=options)
    compiled = jitted.lower(*operands).compile()
    if not replaced:
        return lambda: jax.block_until_ready(compiled(*operands))

    def update() -> None:
        for place, result in zip(replaced, jax.block_until_ready(compiled(*operands)), strict=True):
            operands[place] = result

    return update


def time_calls(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time calls where their time is spent: on the host's clock on CPU, else on the device's.

    Args:
      calls: what to run, by name; each has run once.
      rounds: how many times each has its turn.

    Returns:
      The time of one call, by name, in microseconds.
    """
    if jax.default_backend() == "cpu":
        return alternate(calls, rounds)
    return {name: busy for name, (busy, _) in device_times(calls, rounds).items()}


def device_times(
    calls: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Time calls by what the profiler records of the default device.

    A host's clock counts what it takes to start a call, tens of microseconds, which hides small
    kernels. Here only the time counts in which a kernel or a copy runs.

    Args:
      calls: what to run, by name; each has run once, and waits for its end.
      rounds: how many times each runs.

    Returns:
      By name, the median time of one call in microseconds, and how many kernels and copies it
      starts.
    """
    zero = jnp.zeros(())
    mark = jax.jit(_marker).lower(zero).compile()
    jax.block_until_ready(mark(zero))
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            for name in calls:
                for _ in range(rounds):
                    jax.block_until_ready(mark(zero))
                    calls[name]()
        finally:
            jax.profiler.stop_trace()
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        taken = runs_between(device_events(str(trace)), _marker.__name__)
    if len(taken) != rounds * len(calls):
        raise RuntimeError(
            f"the profiler must record {rounds * len(calls)} calls, and recorded {len(taken)}: "
            "time fewer candidates at once (--shapes), or on a device that nothing else profiles"
        )
    found = {}
    for i, name in enumerate(calls):
        some = taken[i * rounds : (i + 1) * rounds]
        busy = statistics.median(_busy(run) for run in some) / 1e3
        found[name] = busy, statistics.median(map(len, some))
    return found


Event = tuple[str, float, float]  # the program's name, start and duration in nanoseconds


def _marker(x: jax.Array) -> jax.Array:
    return x + 1


def device_events(path: str) -> list[Event]:
    """Read what ran on the first device of a trace, in the order of its start.

    Args:
      path: an .xplane.pb file of `jax.profiler`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of jaxlib's own types
        data = jax.profiler.ProfileData.from_file(path)
        events = [
            (str(dict(event.stats).get("hlo_module", "")), event.start_ns, event.duration_ns)
            for plane in data.planes
            if plane.name in ("/device:GPU:0", "/device:TPU:0")
            for line in plane.lines
            if line.name.startswith("Stream") or line.name == "XLA Ops"
            for event in line.events
        ]
    return sorted(events, key=lambda event: event[1])


def runs_between(events: Sequence[Event], marker: str) -> list[list[Event]]:
    """Cut a device's events into those behind each run of a marker program."""
    runs: list[list[Event]] = []
    for event in events:
        if event[0] == f"jit_{marker}":
            runs.append([])
        elif runs:
            runs[-1].append(event)
    return runs


def _busy(events: Sequence[Event]) -> float:
    """Return the time in which at least one of the events runs."""
    busy, end = 0.0, 0.0
    for _, start, duration in events:
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return busy


def alternate(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time calls in alternating rounds, each often enough for the clock.

    Args:
      calls: what to run, by name; each has run once.
      rounds: how many times each has its turn; every second one in reversed order.

    Returns:
      The median of each one's rounds, in microseconds a call.
    """
    often = {}
    for name, call in calls.items():
        often[name] = max(1, round(_LEAST_SECONDS / _seconds(call, 1)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in reversed(times) if turn % 2 else times:
            times[name].append(_seconds(calls[name], often[name]) / often[name])
    return {name: 1e6 * statistics.median(taken) for name, taken in times.items()}


def _seconds(call: Callable[[], object], often: int) -> float:
    start = time.perf_counter()
    for _ in range(often):
        call()
    return time.perf_counter() - start


def machine() -> str:
    """Name the default device; of a CPU its model and the cores that this process may use."""
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
