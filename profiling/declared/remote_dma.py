"""What a traced Pallas kernel sends to other devices by remote DMA, read from its body.

No collective of HLO shows it: the compiled module has one custom call. So the bytes are those of
the kernel's own copies to other devices, added up over its loops and its grid.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from txcore import _compat
from txcore.profiling import meshes
from txcore.profiling.declared.equations import BRANCHING, KERNELS, Eqn, Jaxpr, open_jaxpr

REMOTE_DMA = "remote-dma"


@dataclass(frozen=True)
class Sent:
    """What one call of a kernel sends.

    Attributes:
      axes: the mesh axes along which its copies leave the device.
      dtype: of what is sent.
      elements: that each device sends.
      known: False where a branch, a loop or a form that is not known here decides: then `elements`
        means nothing.
    """

    axes: tuple[str, ...]
    dtype: np.dtype
    elements: int
    known: bool


@dataclass(frozen=True)
class _Copy:
    """One equation that talks to another device; `elements` is None where it is not known."""

    device: object
    elements: int | None
    dtype: str


def sent_by_kernel(eqn: Eqn, sizes: meshes.Sizes) -> Sent | None:
    """Return what the kernel of an equation sends; None for a kernel that talks to nobody.

    Args:
      eqn: any equation.
      sizes: the mesh around it.
    """
    if eqn.primitive.name not in KERNELS or _compat.is_of_gpu(eqn):
        return None
    copies = [copy for body in _bodies_of(eqn) for copy in _list_copies(body, 1)]
    if not copies:
        return None
    runs = _compat.kernel_grid(eqn)
    sent: Counter[str] = Counter()
    for copy in copies:
        sent[copy.dtype] += copy.elements or 0
    dtypes = [dtype for dtype in sent if dtype]
    known = runs is not None and len(dtypes) <= 1 and all(c.elements is not None for c in copies)
    dtype = np.dtype(dtypes[0] if dtypes else "uint8")
    # A kernel that gives all coordinates of a device may say which of them are not its own.
    said = _compat.kernel_metadata(eqn).get("sends_along", "").split(",")
    axes = _axes_of(copies, sizes)
    axes = tuple(axis for axis in axes if axis in said) or axes
    return Sent(axes, dtype, sum(sent.values()) * (runs or 0), known)


def _axes_of(copies: list[_Copy], sizes: meshes.Sizes) -> tuple[str, ...]:
    named: set[str] = set()
    for copy in copies:
        every = [axis for axis, _ in sizes]
        named.update(copy.device if isinstance(copy.device, Mapping) else every)
    return tuple(axis for axis, size in sizes if axis in named and size > 1)


def _bodies_of(eqn: Eqn) -> list[Jaxpr]:
    """Return all jaxprs in an equation's parameters, those of kernels too."""
    found: list[Jaxpr] = []
    for parameter in eqn.params.values():
        ones = parameter if isinstance(parameter, tuple | list) else (parameter,)
        found += [inner for inner in map(open_jaxpr, ones) if hasattr(inner, "eqns")]
    return found


def _list_copies(body: Jaxpr, times: int) -> Iterator[_Copy]:
    for eqn in body.eqns:
        device = _compat.remote_device(eqn)
        if device is not None:
            yield _describe_copy(eqn, device, times)
        trips = int(eqn.params["length"]) if eqn.primitive.name == "scan" else 1
        for inner in _bodies_of(eqn):
            for copy in _list_copies(inner, times * trips):
                # Which branch is taken, and how often a while loops, is known when it runs.
                is_open = eqn.primitive.name in BRANCHING and copy.elements != 0
                yield _Copy(copy.device, None, copy.dtype) if is_open else copy


def _describe_copy(eqn: Eqn, device: object, times: int) -> _Copy:
    if eqn.primitive.name != "dma_start":
        return _Copy(device, 0, "")  # a signal moves no array
    copied = _compat.copied_array(eqn)
    if copied is None:
        return _Copy(device, None, "")
    elements, dtype = copied
    return _Copy(device, elements * times, np.dtype(dtype).name)
