"""Count the FLOPs of matrix products and convolutions in HLO, as XLA's own cost analysis does.

A multiply and an add are two. A convolution counts the positions at which its window lies on real
elements, neither on padding nor between dilated ones: XLA writes a batched matrix product for TPU
as a convolution whose dilation skips all but the batch's own pairs, and a gradient as one that
skips the zeros between the strides.
"""

import functools
import math
import re
from dataclasses import dataclass

import numpy as np

from txcore.profiling.hlo import HloError, Instruction, Shape, attributes, parse_shapes
from txcore.profiling.hlo.graph import Scope, operand_names

_DOTS = ("dot", "ragged-dot", "scaled-dot")
_CONTRACTED = re.compile(r"\blhs_contracting_dims=\{([\d,\s]*)\}")
_BLAS_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([\d",\s]*)\]')
_LABELS = re.compile(r"\bdim_labels=([a-z\d?]++)_([a-z\d?]++)->([a-z\d?]++)")
_WINDOW = re.compile(r"\bwindow=\{([^{}]*)\}")
_GROUPS = r"\b{}_group_count=(\d+)"
_PALLAS_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
# Which of (first operand, second operand, result) is the input, the filter and the output.
_CUDNN_ROLES = {
    "__cudnn$convBackwardInput": (2, 1, 0),
    "__cudnn$convBackwardFilter": (0, 2, 1),
}
_FORWARD = (0, 1, 2)


def flops_of(instruction: Instruction, scope: Scope) -> tuple[str, int] | None:
    """Return the dtype of the factors and the FLOPs of one instruction.

    Args:
      instruction: one of `scope`'s; a fusion has no FLOPs of its own, its instructions have.
      scope: its computation.

    Returns:
      ("bfloat16", 2 x M x N x K); None where it is neither a matrix product nor a convolution. A
      Pallas kernel for TPU has the FLOPs of its `cost_estimate`.

    Raises:
      HloError: a matrix product or convolution that cannot be read.
    """
    if instruction.opcode in _DOTS:
        return _flops_of_product(instruction, scope, _CONTRACTED)
    if instruction.opcode == "convolution":
        return _flops_of_convolution(instruction, scope, _FORWARD)
    if instruction.opcode != "custom-call":
        return None
    target = attributes.custom_call_target(instruction)
    if target.startswith("__cublas$"):
        return _flops_of_product(instruction, scope, _BLAS_CONTRACTED)
    if target.startswith("__cudnn$conv"):
        return _flops_of_convolution(instruction, scope, _CUDNN_ROLES.get(target, _FORWARD))
    if target == "tpu_custom_call" and (said := _PALLAS_ESTIMATE.search(instruction.rest)):
        return parse_shapes(instruction.type)[0].dtype, int(said[1])
    return None


def _flops_of_product(
    instruction: Instruction, scope: Scope, contracted: re.Pattern[str]
) -> tuple[str, int]:
    left, *_ = _shapes_of_factors(instruction, scope)
    found = contracted.search(instruction.rest)
    dims = [int(d) for d in re.findall(r"\d+", found[1])] if found else []
    if any(d >= len(left.dims) for d in dims):
        raise HloError(f"{instruction.name} contracts dim {max(dims)} of {left.dims}")
    result = parse_shapes(instruction.type)[0]
    return left.dtype, 2 * result.elements * math.prod(left.dims[d] for d in dims)


def _shapes_of_factors(instruction: Instruction, scope: Scope) -> list[Shape]:
    found = [scope.by_name.get(name) for name in operand_names(instruction)[:2]]
    if len(found) < 2 or None in found:
        raise HloError(f"{instruction.name} needs two operands that are defined")
    return [parse_shapes(i.type)[0] for i in found if i is not None]


def _flops_of_convolution(
    instruction: Instruction, scope: Scope, roles: tuple[int, int, int]
) -> tuple[str, int]:
    first, second = _shapes_of_factors(instruction, scope)
    shapes = (first, second, parse_shapes(instruction.type)[0])
    labels = _LABELS.search(instruction.rest)
    if labels is None:
        raise HloError(f"{instruction.name} has no dim_labels")
    sizes = [
        _sizes_by_label(labels[i + 1], shapes[role], instruction) for i, role in enumerate(roles)
    ]
    inputs, filters, outputs = sizes
    spatial = [str(number) for number in range(len(inputs) - 2)]
    for dims, needed in (
        (inputs, ["b", "f", *spatial]),
        (filters, ["i", "o", *spatial]),
        (outputs, spatial),
    ):
        if absent := set(needed) - set(dims):
            raise HloError(f"{instruction.name} has no dim {min(absent)!r} in {labels[0]!r}")
    window = _read_window(instruction, len(spatial))
    positions = math.prod(
        _count_positions(inputs[d], filters[d], outputs[d], window[int(d)]) for d in spatial
    )
    features = inputs["f"] // _read_group_count("feature", instruction) * filters["o"]
    return first.dtype, 2 * features * (
        inputs["b"] // _read_group_count("batch", instruction)
    ) * positions


def _sizes_by_label(labels: str, shape: Shape, instruction: Instruction) -> dict[str, int]:
    if len(labels) != len(shape.dims):
        raise HloError(f"{instruction.name} labels {shape.dims} with {labels!r}")
    return dict(zip(labels, shape.dims, strict=True))


def _read_group_count(what: str, instruction: Instruction) -> int:
    found = re.search(_GROUPS.format(what), instruction.rest)
    return int(found[1]) if found else 1


@dataclass(frozen=True, slots=True)
class _Window:
    """How a window moves along one dim; `pad` is what lies before the first element."""

    stride: int = 1
    pad: int = 0
    input_dilation: int = 1
    filter_dilation: int = 1


def _read_window(instruction: Instruction, dims: int) -> list[_Window]:
    """Return how the window moves along each spatial dim: "size=3x3 stride=2x2 pad=0_1x0_1"."""
    found = _WINDOW.search(instruction.rest)
    said = dict(part.split("=", 1) for part in found[1].split() if "=" in part) if found else {}
    defaults = {"stride": "1", "pad": "0", "lhs_dilate": "1", "rhs_dilate": "1"}
    columns = [said.get(key, "x".join([value] * dims)) for key, value in defaults.items()]
    try:
        rows = [[int(v.split("_")[0]) for v in column.split("x") if v] for column in columns]
        return [_Window(*row) for row in zip(*rows, strict=True)]
    except ValueError:
        raise HloError(f"{instruction.name} has no window of {dims} dims: {said}") from None


@functools.lru_cache(maxsize=4096)
def _count_positions(inputs: int, filters: int, outputs: int, window: _Window) -> int:
    """Count the (output, filter) places along one dim where the window is on an element."""
    if filters == 1 and window == _Window():
        return outputs
    # The shorter one is looped over, so that neither a long signal nor a long filter costs memory.
    short, long = sorted(
        ((outputs, window.stride), (filters, window.filter_dilation)), key=lambda pair: pair[0]
    )
    last = (inputs - 1) * window.input_dilation
    steps = np.arange(long[0], dtype=np.int64) * long[1] - window.pad
    total = 0
    for place in range(short[0]):
        positions = steps + place * short[1]
        total += int(
            (
                (positions >= 0) & (positions <= last) & (positions % window.input_dilation == 0)
            ).sum()
        )
    return total
