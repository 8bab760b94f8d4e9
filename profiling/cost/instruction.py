"""Count the FLOPs of an HLO instruction and the bytes that it moves to and from main memory.

Only matrix products and convolutions have FLOPs, two for each multiply and add, also inside of
fusions; all other instructions count by their bytes. An instruction moves its operands and its
result once each, except what stays in on-chip memory (a memory space `S(1)` in the layout of a TPU)
and what a slice does not read. Of custom calls, those of cuBLAS and cuDNN have FLOPs.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from txcore.profiling.cost.flops import flops_of
from txcore.profiling.hlo import Instruction, attributes, parse_shapes
from txcore.profiling.hlo.graph import Graph, Scope, operand_names

_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "domain"),
        *("partition-id", "replica-id", "after-all", "add-dependency", "opt-barrier", "recv"),
    }
)
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "CreateBuffer", "AssumeGatherIndicesInBound")
_SLICES = ("dynamic-slice", "slice", "gather")
_RENAMES = ("bitcast", "reshape", "copy", "get-tuple-element")

_ARRAY = re.compile(r"(?<!\w)[a-z]\w*+\[[^\[\]]*+\](?:\{([^{}]*)\})?")


@dataclass(frozen=True, slots=True)
class Work:
    """What one device does: `flops` by dtype of the operands, and `bytes` of main memory."""

    flops: tuple[tuple[str, int], ...] = ()
    bytes: int = 0

    @property
    def total_flops(self) -> int:
        """Return the FLOPs of all dtypes."""
        return sum(flops for _, flops in self.flops)


def count_work(instruction: Instruction, scope: Scope, graph: Graph) -> Work:
    """Count the work of one instruction; a fusion's includes all that is fused into it.

    Args:
      instruction: one of `scope`'s, but no loop, call or conditional: those run others.
      scope: its computation.
      graph: its module.

    Raises:
      HloError: a matrix product or convolution that cannot be read.
    """
    if instruction.opcode in _FREE or _is_free_call(instruction):
        return Work()
    if instruction.opcode.endswith("-start"):
        return _count_work_of_start(instruction, scope, graph)
    fused = _fused_scope(instruction, graph)
    if fused is None:
        flops = flops_of(instruction, scope)
        return Work((flops,) if flops else (), _bytes_moved(instruction, scope))
    moved = _bytes_moved_by_fusion(instruction, scope, fused)
    return Work(tuple(_fused_flops(fused, graph)), moved)


@functools.lru_cache(maxsize=1 << 16)  # a large module has few different types
def memory_bytes(type_: str) -> int:
    """Return the bytes of a printed type's arrays, without those in on-chip memory.

    Example:
      >>> memory_bytes("(f32[8]{0}, bf16[16]{0:T(128)S(1)})")
      32
    """
    arrays = _ARRAY.finditer(type_)
    return sum(parse_shapes(a[0])[0].bytes for a in arrays if "S(" not in (a[1] or ""))


def _is_free_call(instruction: Instruction) -> bool:
    return (
        instruction.opcode == "custom-call"
        and attributes.custom_call_target(instruction) in _FREE_CALLS
    )


def _fused_scope(instruction: Instruction, graph: Graph) -> Scope | None:
    if instruction.opcode not in ("fusion", "fusion-start"):
        return None
    called = (c for c in instruction.callees if c in graph.module.computations)
    return next((graph.scope_of(name) for name in called), None)


def _count_work_of_start(instruction: Instruction, scope: Scope, graph: Graph) -> Work:
    """Count the background work of an asynchronous instruction that is not a collective."""
    if (fused := _fused_scope(instruction, graph)) is not None:
        moved = _bytes_moved_by_fusion(instruction, scope, fused)
        return Work(tuple(_fused_flops(fused, graph)), moved)
    called = [c for c in instruction.callees if c in graph.module.computations]
    if called:
        inner = [
            count_work(i, graph.scope_of(c), graph)
            for c in called
            for i in graph.module.computations[c].instructions
        ]
        flops = tuple(f for work in inner for f in work.flops)
        return Work(flops, sum(work.bytes for work in inner))
    done = scope.dones.get(instruction.name)
    result = done.type if done is not None else instruction.type
    # A slice-start or copy-start moves what its done returns, from one memory to another.
    size = sum(shape.bytes for shape in parse_shapes(result))
    ends = [result, *(_type_of(name, scope) for name in operand_names(instruction)[:1])]
    return Work(bytes=sum(size for end in ends if memory_bytes(end)))


def _type_of(name: str, scope: Scope) -> str:
    found = scope.by_name.get(name)
    return found.type if found is not None else ""


def _bytes_moved(instruction: Instruction, scope: Scope) -> int:
    names = operand_names(instruction)
    if instruction.opcode in _SLICES:
        return 2 * memory_bytes(instruction.type)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * memory_bytes(_type_of(names[1], scope)) if len(names) > 1 else 0
    read = sum(memory_bytes(_type_of(name, scope)) for name in dict.fromkeys(names))
    return read + memory_bytes(instruction.type)


def _bytes_moved_by_fusion(instruction: Instruction, scope: Scope, fused: Scope) -> int:
    read: dict[str, int] = {}
    for number, name in enumerate(operand_names(instruction)):
        whole = memory_bytes(_type_of(name, scope))
        part = _bytes_read_in_part(fused.parameters.get(number), fused)
        # The same array in two places is read once.
        read[name] = max(read.get(name, 0), whole if part is None else min(whole, part))
    return sum(read.values()) + _bytes_written(instruction, fused)


def _bytes_read_in_part(parameter: Instruction | None, fused: Scope) -> int | None:
    """Return the bytes that a fusion reads of one operand, or None where it reads all."""
    if parameter is None:
        return None
    total = 0
    for user in fused.users.get(parameter.name, ()):
        is_first = operand_names(user)[:1] == (parameter.name,)
        if user.opcode in _SLICES and is_first:
            total += sum(shape.bytes for shape in parse_shapes(user.type))
        elif not (user.opcode == "dynamic-update-slice" and is_first):
            return None  # an update in place reads nothing of what it updates
    return total


def _bytes_written(instruction: Instruction, fused: Scope) -> int:
    root = fused.root
    for _ in fused.by_name:  # damaged text may define a value by itself
        if root is None or root.opcode not in _RENAMES:
            break
        root = fused.by_name.get(next(iter(operand_names(root)), ""))
    if root is not None and root.opcode == "dynamic-update-slice":
        names = operand_names(root)
        update = _type_of(names[1], fused) if len(names) > 1 else ""
        return min(memory_bytes(instruction.type), sum(s.bytes for s in parse_shapes(update)))
    return memory_bytes(instruction.type)


def _fused_flops(fused: Scope, graph: Graph) -> Iterator[tuple[str, int]]:
    for instruction in fused.computation.instructions:
        if (inner := _fused_scope(instruction, graph)) is not None:
            yield from _fused_flops(inner, graph)
        elif (found := flops_of(instruction, fused)) is not None:
            yield found
