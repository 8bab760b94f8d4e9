"""Collectives that XLA for TPU carries out in steps, each in a fusion that prints it in full.

The first goes into a custom call AsyncCollectiveStart, the last into AsyncCollectiveDone, with
fusions between that compute something else meanwhile. Only the first counts.
"""

import re

from txcore.profiling.hlo.graph import Graph, Value, operand_names
from txcore.profiling.hlo.text import Instruction

_STEP = "async_collective_fusion_config"
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")

Key = tuple[str, str]


def is_later_step(instruction: Instruction, computation: str, graph: Graph) -> bool:
    """Tell whether a collective continues one that another computation starts."""
    if _STEP not in instruction.rest:
        return False
    starts = _steps(graph, "AsyncCollectiveStart").get(_key(instruction), [])
    return bool(starts) and all(v.scope.computation.name != computation for v in starts)


def last_step(instruction: Instruction, graph: Graph) -> Value | None:
    """Return the fusion that ends a collective, which keeps its tag; None where several may."""
    if _STEP not in instruction.rest:
        return None
    dones = _steps(graph, "AsyncCollectiveDone").get(_key(instruction), [])
    call = graph.only_caller(dones[0].scope.computation.name) if len(dones) == 1 else None
    return Value(graph.scope(call.caller), call.instruction) if call else None


def _key(instruction: Instruction) -> Key:
    channel = _CHANNEL.search(instruction.rest)
    return instruction.opcode, channel[1] if channel else ""


def _steps(graph: Graph, target: str) -> dict[Key, list[Value]]:
    found: dict[Key, list[Value]] = {}
    for call in graph.custom_calls(target):
        for name in operand_names(call.instruction):
            operand = call.scope.by_name.get(name)
            if operand is not None and _STEP in operand.rest:
                found.setdefault(_key(operand), []).append(Value(call.scope, operand))
    return found
