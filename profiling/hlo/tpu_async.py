"""Collectives that XLA for TPU carries out in steps, each in a fusion that prints it in full.

The first goes into a custom call AsyncCollectiveStart, the last into AsyncCollectiveDone, with
fusions between that compute something else meanwhile. Only the first counts.
"""

from txcore.profiling.hlo.graph import STEP, Graph, Value
from txcore.profiling.hlo.text import Instruction


def is_later_step(instruction: Instruction, computation: str, graph: Graph) -> bool:
    """Tell whether a collective continues one that another computation starts."""
    if STEP not in instruction.rest:
        return False
    starts = graph.steps_into("AsyncCollectiveStart", instruction)
    return bool(starts) and computation not in starts


def last_step(instruction: Instruction, graph: Graph) -> Value | None:
    """Return the fusion that ends a collective, which keeps its tag; None where several may."""
    if STEP not in instruction.rest:
        return None
    dones = graph.steps_into("AsyncCollectiveDone", instruction)
    if len(dones) != 1 or len(*dones.values()) != 1:
        return None
    call = graph.only_caller(*dones)
    return Value(graph.scope_of(call.caller), call.instruction) if call else None
