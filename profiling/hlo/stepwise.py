"""Collectives that XLA for TPU carries out in steps, each in a fusion that prints it in full.

The first goes into a custom call AsyncCollectiveStart, the last into AsyncCollectiveDone, with
fusions between that compute something else meanwhile. Only the first counts.
"""

from txcore.profiling.hlo.graph import Graph, Value
from txcore.profiling.hlo.text import Instruction

_STEP = "async_collective_fusion_config"


def is_later_step(instruction: Instruction, computation: str, graph: Graph) -> bool:
    """Tell whether a collective continues one that another computation starts."""
    if _STEP not in instruction.rest:
        return False
    starts = _steps(graph, "AsyncCollectiveStart", instruction)
    return bool(starts) and all(v.scope.computation.name != computation for v in starts)


def last_step(instruction: Instruction, graph: Graph) -> Value | None:
    """Return the fusion that ends a collective, which keeps its tag; None where several may."""
    if _STEP not in instruction.rest:
        return None
    dones = _steps(graph, "AsyncCollectiveDone", instruction)
    call = graph.only_caller(dones[0].scope.computation.name) if len(dones) == 1 else None
    return Value(graph.scope(call.caller), call.instruction) if call else None


def _steps(graph: Graph, target: str, like: Instruction) -> list[Value]:
    into = graph.into_custom_calls(target, like)
    return [value for value in into if _STEP in value.instruction.rest]
