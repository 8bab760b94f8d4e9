"""The time of calls side by side: by the host's clock, or by the profiler's records of a device."""

import itertools
import pathlib
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Of one round of one candidate: the cost of the clock and of the queue is small beside it.
_LEAST_SECONDS = 0.01

Event = tuple[str, float, float]  # the program's name, start and duration in nanoseconds


def time_calls(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time calls by the host's clock on CPU, and by the profiler's records on an accelerator.

    Args:
      calls: name -> what to run; each has run once.
      rounds: how often each is timed.

    Returns:
      name -> the time of one call in microseconds.
    """
    if jax.default_backend() == "cpu":
        return alternate_calls(calls, rounds)
    return {name: busy for name, (busy, _) in device_times(calls, rounds).items()}


def device_times(
    calls: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Time calls by what the profiler records of the default device.

    By the host's clock, a small kernel would hide behind the start of its call, which takes tens
    of microseconds. Here only the time counts in which a kernel or a copy runs.

    Args:
      calls: name -> what to run; each has run once, and waits for its end.
      rounds: how often each runs.

    Returns:
      name -> the median time of one call in microseconds, and the number of kernels and copies
      that it starts.
    """
    zero = jnp.zeros(())
    mark = jax.jit(_run_marker).lower(zero).compile()
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
        taken = runs_between(device_events(str(trace)), _run_marker.__name__)
    if len(taken) != rounds * len(calls):
        raise RuntimeError(
            f"the profiler needs to record {rounds * len(calls)} calls, got {len(taken)}: time "
            "fewer candidates at once (--shapes), or on a device that nothing else profiles"
        )
    found = {}
    for i, name in enumerate(calls):
        some = taken[i * rounds : (i + 1) * rounds]
        busy = statistics.median(_busy_nanoseconds(run) for run in some) / 1e3
        found[name] = busy, statistics.median(map(len, some))
    return found


def _run_marker(x: jax.Array) -> jax.Array:
    return x + 1


def device_events(path: str) -> list[Event]:
    """Read the events of the first device in a trace, in the order of their starts.

    Args:
      path: an .xplane.pb file of `jax.profiler`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of jaxlib's own types
        data = jax.profiler.ProfileData.from_file(path)
        planes = [p for p in data.planes if p.name in ("/device:GPU:0", "/device:TPU:0")]
        events = []
        for line in itertools.chain.from_iterable(plane.lines for plane in planes):
            if line.name.startswith("Stream") or line.name == "XLA Ops":
                events += [_read_event(event) for event in line.events]
    return sorted(events, key=lambda event: event[1])


def _read_event(event: Any) -> Event:
    return str(dict(event.stats).get("hlo_module", "")), event.start_ns, event.duration_ns


def runs_between(events: Sequence[Event], marker: str) -> list[list[Event]]:
    """Group a device's events by the run of a marker program that they follow."""
    runs: list[list[Event]] = []
    for event in events:
        if event[0] == f"jit_{marker}":
            runs.append([])
        elif runs:
            runs[-1].append(event)
    return runs


def _busy_nanoseconds(events: Sequence[Event]) -> float:
    """Return how long at least one of the events runs, in nanoseconds."""
    busy, end = 0.0, 0.0
    for _, start, duration in events:
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return busy


def alternate_calls(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time calls in alternating rounds, each repeated often enough for the clock.

    Args:
      calls: name -> what to run; each has run once.
      rounds: how often each is timed; every second round is in reversed order.

    Returns:
      name -> the median over the rounds of the time of one call, in microseconds.
    """
    often = {}
    for name, call in calls.items():
        often[name] = max(1, round(_LEAST_SECONDS / _run_seconds(call, 1)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in reversed(times) if turn % 2 else times:
            times[name].append(_run_seconds(calls[name], often[name]) / often[name])
    return {name: 1e6 * statistics.median(taken) for name, taken in times.items()}


def _run_seconds(call: Callable[[], object], often: int) -> float:
    start = time.perf_counter()
    for _ in range(often):
        call()
    return time.perf_counter() - start
