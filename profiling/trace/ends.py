"""When operations have ended that go on in a pool of threads (XLA for CPU).

The profiler says when an operation had ended at the latest. It has ended, too, when the first one
starts that needs its result, and when the loop that it is in has ended.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence

from txcore.profiling.trace.model import Event, Program

_DEEPEST = 16  # loops within each other


def find_ends(events: Sequence[Event], runs: Sequence[int], program: Program | None) -> list[int]:
    """Return when each event of one module on one device had ended.

    Args:
      events: by start.
      runs: which execution of the module each belongs to.
      program: the module; without it an operation ends where the next one starts.

    Returns:
      An end for each: not before its own `end`, and not after its `latest`.
    """
    by_op: dict[tuple[int, str], list[int]] = defaultdict(list)
    last: dict[int, int] = defaultdict(int)
    for event, run in zip(events, runs, strict=True):
        by_op[run, event.op].append(event.start)
        last[run] = max(last[run], event.end)
    found = []
    for i, (event, run) in enumerate(zip(events, runs, strict=True)):
        if event.latest <= event.end:
            found.append(event.end)
            continue
        bound = min(event.latest, last[run])
        if program is None:
            bound = min(bound, events[i + 1].start if i + 1 < len(events) else bound)
        else:
            bound = min(bound, _first_need(event.op, event.start, run, program, by_op, bound))
        found.append(max(event.end, bound))
    return found


def _first_need(
    op: str,
    start: int,
    run: int,
    program: Program,
    by_op: dict[tuple[int, str], list[int]],
    bound: int,
) -> int:
    """Return the first start of what needs an operation's result, or that of its loop."""
    for _ in range(_DEEPEST):
        for user in program.users.get(op, ()):
            starts = by_op.get((run, user), ())
            place = bisect_right(starts, start)
            if place < len(starts):
                bound = min(bound, starts[place])
        caller = program.caller.get(op, "")
        if not caller:
            break
        begun = by_op.get((run, caller), ())
        place = bisect_right(begun, start)
        if not place:  # it is not in the trace
            break
        op, start = caller, begun[place - 1]
    return bound
