"""Count how often each computation of a module runs in one call of the program."""

from collections import defaultdict
from dataclasses import dataclass

from txcore.profiling.hlo import attributes
from txcore.profiling.hlo.graph import Call, Graph
from txcore.profiling.hlo.loops import count_trips
from txcore.profiling.hlo.types import MOST


@dataclass(frozen=True, slots=True)
class Trips:
    """How often something runs.

    Attributes:
      count: executions; `MOST` + 1 stands for any larger number.
      known: False where a loop of unknown length is involved: then `count` is a lower bound.
    """

    count: int
    known: bool = True


ONCE = Trips(1)


def count_runs(graph: Graph) -> dict[str, Trips]:
    """Count how often each computation runs, loops multiplied and calls added.

    Every branch of a conditional counts, as in the traced program: an upper bound. A computation
    that nothing calls counts once: a damaged text must not hide what is in it.

    Args:
      graph: of an HLO module.

    Returns:
      For each computation's name, its runs in one call of the program.
    """
    calls: dict[str, list[str]] = {name: [] for name in graph.module.computations}
    total: dict[str, Trips] = {}
    callers: dict[str, list[tuple[str, Trips]]] = defaultdict(list)
    for call in graph.calls:
        calls[call.caller].append(call.callee)
        callers[call.callee].append((call.caller, trips_of(call, graph)))
    for name in _callers_first(calls):
        incoming = [
            Trips(
                _bound_count(total[caller].count * trips.count), total[caller].known and trips.known
            )
            for caller, trips in callers[name]
            if caller in total  # a caller not counted yet is a cycle, which only damage makes
        ]
        count = _bound_count(sum(t.count for t in incoming)) if incoming else 1
        total[name] = Trips(count, all(t.known for t in incoming))
    return total


def _bound_count(count: int) -> int:
    return min(count, MOST + 1)


def trips_of(call: Call, graph: Graph) -> Trips:
    """Return how often one call runs its callee: once, except for a loop."""
    if call.instruction.opcode != "while":
        return ONCE
    count = attributes.trip_count(call.instruction)
    if count is None:
        count = count_trips(call.instruction, graph.scope_of(call.caller), graph)
    return Trips(1, known=False) if count is None else Trips(count)


def _callers_first(calls: dict[str, list[str]]) -> list[str]:
    """Order the computations so that each comes after all that call it."""
    done: list[str] = []
    state: dict[str, bool] = {}  # absent: not seen, False: being visited, True: done
    for root in calls:
        stack = [(root, iter(calls[root]))] if root not in state else []
        state.setdefault(root, False)
        while stack:
            name, edges = stack[-1]
            callee = next((c for c in edges if c not in state), None)
            if callee is None:
                state[name] = True
                done.append(name)
                stack.pop()
            else:
                state[callee] = False
                stack.append((callee, iter(calls[callee])))
    return done[::-1]
