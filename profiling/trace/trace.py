"""`read_trace`: from a folder to the figures of a trace, as data."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from txcore.profiling.trace.clocks import align_ranks
from txcore.profiling.trace.figures import (
    CollectiveTime,
    time_collectives,
    time_operations,
)
from txcore.profiling.trace.folder import read_folder
from txcore.profiling.trace.join import join_rank
from txcore.profiling.trace.model import Rank, TraceError
from txcore.profiling.trace.steps import choose_step_program, find_steps
from txcore.profiling.trace.stragglers import find_stragglers
from txcore.profiling.trace.trace_model import TraceModel
from txcore.profiling.trace.waits import find_waits

# (platform, processes, kind, group size) to (bytes of S, bytes a second on the bus) of each size.
Best = Mapping[tuple[str, int, str, int], Sequence[tuple[int, float]]]


class Trace(TraceModel):
    """What a trace says; print it to read it. See `TraceModel` for its fields."""

    def __str__(self) -> str:
        from txcore.profiling.trace.show.table import format_trace  # tabulate, costly to import

        return format_trace(self)

    def _repr_html_(self) -> str:
        from txcore.profiling.report.html.notebook import frame_page
        from txcore.profiling.trace.show.page import to_page
        from txcore.profiling.trace.show.table import write_verdict

        return frame_page(to_page(self), write_verdict(self))


def read_trace(
    folder: str | os.PathLike[str],
    *,
    hlo: Sequence[str] = (),
    program: str | None = None,
    best: Best | None = None,
) -> Trace:
    """Read a folder of `tx.profile`, join its events to the programs, and measure.

    Args:
      folder: of `tx.profile`, or of `jax.profiler.trace`, or one `.xplane.pb`.
      hlo: texts of the optimized HLO of programs that ran, where the folder does not hold them.
      program: the module whose runs are the steps; by default the one that took the most time.
      best: what this machine was measured to reach.

    Returns:
      The trace.

    Raises:
      TraceError: there is no trace, or a file of it cannot be read; or no such program in it.

    Example:
      >>> import tempfile
      >>> double, x = jax.jit(lambda x: x + x), jnp.ones(3)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with tx.profile(folder, steps=2) as recording:
      ...         for _ in range(3):
      ...             with recording.step():
      ...                 x = double(x)
      ...     trace = read_trace(folder)
      >>> trace.program, len(trace.steps), trace.ok
      ('jit__lambda', 2, True)
    """
    ranks, missing = read_folder(folder, hlo)
    return measure_ranks(ranks, notes=missing, program=program, best=best)


def measure_ranks(
    ranks: Sequence[Rank],
    *,
    notes: Sequence[str] = (),
    program: str | None = None,
    best: Best | None = None,
) -> Trace:
    """Measure traces that were read; see `read_trace`."""
    both = [join_rank(rank) for rank in ranks]
    joined = [event for events, _ in both for event in events]
    said = [*notes, *(note for rank in ranks for note in rank.notes)]
    said += [note for _, each in both for note in each]
    events, work, aligned = align_ranks(ranks, joined)
    modules = {event.module for event in events}
    if program is not None and program not in modules:
        raise TraceError(
            f"the trace needs runs of the program {program!r} for its steps, but has those of "
            f"{', '.join(sorted(modules)) or 'none'}: name one of them"
        )
    if not events:
        why = "nothing ran while it was recorded"
        why = "those of TPUs are not read yet" if ranks[0].platform == "tpu" else why
        said.append(f"the trace has no event of a device that can be joined: {why}")
    events = tuple(sorted(events, key=lambda e: (e.start, e.rank, e.device)))
    waits, together = find_waits(events, ranks)
    chosen = choose_step_program(events) if program is None else program
    steps, cut = find_steps(events, work, waits, chosen)
    programs = [p for p in ranks[0].programs if p.module in modules] if ranks else []
    collectives = time_collectives(events, waits, together, programs)
    with_rows = [p for rank in ranks for p in rank.programs if p.rows and p.module in modules]
    return Trace(
        platform=ranks[0].platform,
        devices=tuple(sorted({(e.rank, e.device) for e in events})),
        program=chosen,
        collectives=tuple(_with_best(c, ranks, best or {}) for c in collectives),
        operations=time_operations(events),
        steps=steps,
        stragglers=find_stragglers(steps),
        events=events,
        work=work,
        waiting={
            (events[i].rank, events[i].device, events[i].start): wait.waiting
            for i, wait in waits.items()
            if wait.waiting
        },
        joined=(sum(e.place is not None for e in events), len(events)),
        checked=all(p.checked for p in with_rows),
        notes=tuple(dict.fromkeys((*said, *aligned, *cut))),
    )


def _with_best(time: CollectiveTime, ranks: Sequence[Rank], best: Best) -> CollectiveTime:
    """Add what the machine reaches at the measured size that is the nearest, by ratio."""
    processes = ranks[0].processes or len(ranks)
    key = (ranks[0].platform, processes, time.row.kind, time.row.group_size)
    measured = best.get(key, ())
    payload = time.row.payload_bytes
    if not measured or not payload:
        return time
    _, speed = min(measured, key=lambda each: abs(math.log(max(each[0], 1) / payload)))
    return replace(time, best=speed)
