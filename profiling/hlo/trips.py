"""How often each computation of a module runs in one call of the program."""

from collections import defaultdict
from dataclasses import dataclass

from txcore.profiling.hlo import attributes
from txcore.profiling.hlo.text import Instruction, Module

_CALLERS = frozenset({"fusion", "call", "while", "conditional", "custom-call", "map"})


@dataclass(frozen=True, slots=True)
class Trips:
    """`count` runs; where not `known`, a loop runs at least once and nobody knows how often."""

    count: int
    known: bool = True


ONCE = Trips(1)


def runs(module: Module) -> dict[str, Trips]:
    """Count how often each computation runs, loops multiplied and calls added.

    Every branch of a conditional counts, as in the traced program: an upper bound. A computation
    that nothing calls counts once: a damaged text must not hide what is in it.

    Args:
      module: an HLO module.

    Returns:
      For each computation's name, its runs in one call of the program.
    """
    calls = {name: _calls(c.instructions, module) for name, c in module.computations.items()}
    total: dict[str, Trips] = {}
    callers: dict[str, list[tuple[str, Trips]]] = defaultdict(list)
    for caller, edges in calls.items():
        for callee, trips in edges:
            callers[callee].append((caller, trips))
    for name in _callers_first(calls):
        incoming = [
            Trips(total[caller].count * trips.count, total[caller].known and trips.known)
            for caller, trips in callers[name]
            if caller in total  # a caller not counted yet is a cycle, which only damage makes
        ]
        total[name] = Trips(
            sum(t.count for t in incoming) if incoming else 1, all(t.known for t in incoming)
        )
    return total


def _calls(instructions: tuple[Instruction, ...], module: Module) -> list[tuple[str, Trips]]:
    edges = []
    for instruction in instructions:
        # An async pair's -done and -update name the computation of their -start again.
        if instruction.opcode in _CALLERS or instruction.opcode.endswith("-start"):
            trips = _trips(instruction)
            edges += [(c, trips) for c in attributes.callees(instruction)]
    return [edge for edge in edges if edge[0] in module.computations]


def _trips(instruction: Instruction) -> Trips:
    if instruction.opcode != "while":
        return ONCE
    count = attributes.trip_count(instruction)
    return Trips(1, known=False) if count is None else Trips(count)


def _callers_first(calls: dict[str, list[tuple[str, Trips]]]) -> list[str]:
    """Order the computations so that each comes after all that call it."""
    done: list[str] = []
    state: dict[str, bool] = {}  # absent: not seen, False: being visited, True: done
    for root in calls:
        stack = [(root, iter(calls[root]))] if root not in state else []
        state.setdefault(root, False)
        while stack:
            name, edges = stack[-1]
            callee = next((c for c, _ in edges if c not in state), None)
            if callee is None:
                state[name] = True
                done.append(name)
                stack.pop()
            else:
                state[callee] = False
                stack.append((callee, iter(calls[callee])))
    return done[::-1]
