"""Tell which custom calls can communicate without the compiler seeing it."""

import re

from txcore.profiling.hlo import attributes
from txcore.profiling.hlo.text import Instruction

# Calls that leave elements as they are. The last ones carry a collective that is printed beside
# them, copy, say how a gather's indices lie, or zero what pads an array in place.
_MOVES = (
    r"InspectSharding|Sharding|SPMDFullToShardShape|SPMDShardToFullShape|xla\.sdy\.|shape_assert"
    r"|LayoutConstraint|AllocateBuffer|MoveToHost|MoveToDevice|PinToDevice|Pin|Unpin|AssumeGather"
    r"|annotate_device_placement|SliceToDynamic|PadToStatic|X64|CreateBuffer|NopReturnToken"
    r"|AsyncCollective(?:Start|Done)$|ConcatBitcast$|GatherScatterIndicesBitpacked$|ZeroCrop$"
)
_MOVES_ELEMENTS = re.compile(_MOVES)
# Those, and calls that compute on one device or call Python on the host. Any other target could
# send anything, and is listed as opaque.
_IS_LOCAL = re.compile(
    r"lapack_|blas_|__cublas|__cudnn|__cusparse|cusolver|cudnn|cublas|hipblas|hipsolver|hiprand"
    r"|cu_|hip_|cuda_threefry|__onednn|__eigen|__ynn|__xnn|__triton|triton_kernel_call|__gpu\$xla"
    r"|TopK|__topk|ApproxTopK|PartialReduce|Eigh|Qr|Cholesky|LuDecomposition|Householder|ProductOf"
    r"|RngBitGenerator|SetBound|GetDimensionSize|dynamic_|erf_inv|mhlo\.|chlo\."
    r"|xla_python_(?:cpu|gpu)_callback|xla_ffi_(?:partitioned_)?python_(?:cpu|gpu)_callback"
    rf"|{_MOVES}"
)
# A Pallas TPU kernel says so itself, where it sends anything to another chip.
TPU_KERNEL = "tpu_custom_call"
_TPU_COMMUNICATES = re.compile(r'\\?"(?:has_communication\\?":\s*true|collective_id\\?":)')
# So does a Mosaic GPU kernel, but for NVSHMEM, whose functions its module names.
_GPU_KERNEL = "mosaic_gpu"
_GPU_IS_LOCAL = re.compile(r"\buses_xla_collective_metadata\s*=\s*false\b")


def is_kernel(target: str) -> bool:
    """Tell whether a custom call runs a Pallas kernel that may send to other devices."""
    return target == TPU_KERNEL or target.startswith(_GPU_KERNEL)


def moves_elements(instruction: Instruction) -> bool:
    """Tell whether a custom call leaves elements as they are, and computes nothing."""
    return _MOVES_ELEMENTS.match(attributes.custom_call_target(instruction)) is not None


def can_communicate(instruction: Instruction) -> bool:
    """Tell whether a custom call may talk to other devices.

    Python callbacks on the host are not counted: they are the user's own code.
    """
    target = attributes.custom_call_target(instruction)
    if target == TPU_KERNEL:
        is_cut = "custom_call_config" not in instruction.rest
        return is_cut or bool(_TPU_COMMUNICATES.search(instruction.rest))
    if target.startswith(_GPU_KERNEL):
        rest = instruction.rest
        return "nvshmem" in rest or _GPU_IS_LOCAL.search(rest) is None
    return _IS_LOCAL.match(target) is None
