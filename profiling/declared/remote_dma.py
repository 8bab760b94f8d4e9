"""What a traced Pallas kernel sends to other devices by remote DMA, read from its body.

No collective of HLO shows it: the compiled module has one custom call. So the bytes are those of
the kernel's own copies to other devices, added up over its loops and its grid; on a GPU those to
the switch of its node, for each block of the grid.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from txcore import _compat
from txcore.profiling import meshes
from txcore.profiling.declared.equations import (
    BRANCHING,
    KERNELS,
    Eqn,
    Jaxpr,
    Var,
    is_literal,
    open_jaxpr,
)

REMOTE_DMA = "remote-dma"
Known = dict[Var, Any]  # integers of each block, as far as they do not depend on the device


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
    if eqn.primitive.name not in KERNELS:
        return None
    if _compat.is_of_gpu(eqn):
        return _sent_to_switch(eqn, sizes)
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


def _sent_to_switch(eqn: Eqn, sizes: meshes.Sizes) -> Sent | None:
    """Return what a Mosaic GPU kernel sends by multimem; None where it sends nothing so.

    A multimem store goes to the switch once, which copies it to all devices. For a multimem load
    the switch reads the same elements of every device and adds them up: as all devices load, each
    sends as many times as there are devices.
    """
    grid = _compat.gpu_grid(eqn)
    bodies = [open_jaxpr(body) for body in eqn.params.get("jaxprs", ())]
    if grid is None or len(bodies) != 1:
        return None
    blocks = int(np.prod(list(grid.values()), dtype=np.int64))
    places = np.unravel_index(np.arange(blocks), tuple(grid.values()) or (1,))
    walk = _Walk(dict(zip(grid, places, strict=False)), dict(sizes))
    found = list(walk.list_copies(bodies[0], {}, np.ones(blocks, np.int64)))
    if not any(copy.axes for copy in found):
        return None
    kinds = {(copy.axes, copy.dtype) for copy in found}
    named = {axis for copy in found for axis in copy.axes}
    axes = tuple(axis for axis, size in sizes if size > 1 and axis in named)
    known = len(kinds) == 1 and all(copy.known for copy in found)
    return Sent(axes, found[0].dtype, sum(copy.elements for copy in found), known)


class _Walk:
    """Walk a kernel's body with the numbers of all of its blocks at once."""

    def __init__(self, places: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        self.places = places
        self.sizes = sizes

    def list_copies(self, body: Jaxpr, known: Known, runs: np.ndarray | None) -> Iterator[Sent]:
        """Yield what each equation sends, `runs` times in each block; None: it is not known."""
        for eqn in body.eqns:
            name = eqn.primitive.name
            if name in ("multimem_store", "multimem_load_reduce"):
                yield self._describe_copy(eqn, runs)
            elif name == "while":
                yield from self._list_looped(eqn, known, runs)
            elif (inner := eqn.params.get("jaxpr")) is not None:
                yield from self._list_called(eqn, open_jaxpr(inner), known, runs)
            elif bodies := _bodies_of(eqn):  # branches, or a form that is not known here
                for body_of_eqn in bodies:
                    yield from self.list_copies(body_of_eqn, {}, None)
            else:
                if name.startswith("inline_mgpu") or _compat.reads_peer(eqn):
                    yield Sent((), np.dtype(np.uint8), 0, False)
                self._compute(eqn, known)

    def _describe_copy(self, eqn: Eqn, runs: np.ndarray | None) -> Sent:
        loads = eqn.primitive.name == "multimem_load_reduce"
        moved = eqn.outvars[0].aval if loads else eqn.invars[0].aval
        given = eqn.params["collective_axes"]
        axes = tuple(map(str, given if isinstance(given, tuple) else (given,)))
        times = 0 if runs is None else int(runs.sum())
        devices = int(np.prod([self.sizes.get(axis, 1) for axis in axes])) if loads else 1
        return Sent(axes, moved.dtype, moved.size * times * devices, runs is not None)

    def _list_looped(self, eqn: Eqn, known: Known, runs: np.ndarray | None) -> Iterator[Sent]:
        body = open_jaxpr(eqn.params["body_jaxpr"])
        first = eqn.params["cond_nconsts"]
        constants = eqn.invars[first : first + eqn.params["body_nconsts"]]
        trips = self._count_trips(eqn, known)
        inside = None if runs is None or trips is None else runs * trips
        there = {v: self._value(o, known) for v, o in zip(body.invars, constants, strict=False)}
        yield from self.list_copies(
            body, {v: value for v, value in there.items() if value is not None}, inside
        )

    def _count_trips(self, eqn: Eqn, known: Known) -> np.ndarray | None:
        """Return how often each block loops, of a loop `while i < end: i += 1`."""
        cond, body = open_jaxpr(eqn.params["cond_jaxpr"]), open_jaxpr(eqn.params["body_jaxpr"])
        constants = eqn.params["body_nconsts"]
        if eqn.params["cond_nconsts"] or [e.primitive.name for e in cond.eqns] != ["lt"]:
            return None
        if cond.outvars[0] is not cond.eqns[0].outvars[0]:
            return None
        places = [cond.invars.index(v) if v in cond.invars else None for v in cond.eqns[0].invars]
        if None in places:
            return None
        index, end = (constants + int(place) for place in places if place is not None)
        steps = [
            e
            for e in body.eqns
            if e.primitive.name == "add"
            and e.outvars[0] is body.outvars[index - constants]
            and e.invars[0] is body.invars[index]
            and is_literal(e.invars[1])
            and e.invars[1].val == 1
        ]
        if not steps or body.outvars[end - constants] is not body.invars[end]:
            return None
        carried = eqn.invars[eqn.params["cond_nconsts"] :]
        start, stop = (self._value(carried[place], known) for place in (index, end))
        return None if start is None or stop is None else np.maximum(stop - start, 0)

    def _list_called(
        self, eqn: Eqn, inner: Jaxpr, known: Known, runs: np.ndarray | None
    ) -> Iterator[Sent]:
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        is_call = len(inner.invars) == len(eqn.invars) and eqn.primitive.name != "scan"
        given = zip(inner.invars, eqn.invars, strict=False) if is_call else ()
        values = {v: self._value(o, known) for v, o in given}
        there = {v: value for v, value in values.items() if value is not None}
        yield from self.list_copies(inner, there, None if runs is None else runs * times)
        if is_call:
            for outer, var in zip(eqn.outvars, inner.outvars, strict=False):
                if (value := self._value(var, there)) is not None:
                    known[outer] = value

    def _compute(self, eqn: Eqn, known: Known) -> None:
        if eqn.primitive.name == "axis_index":
            if (place := self.places.get(eqn.params["axis_name"])) is not None:
                known[eqn.outvars[0]] = place
            return
        compute = _ARITHMETIC.get(eqn.primitive.name)
        dtype = getattr(eqn.outvars[0].aval, "dtype", None) if compute is not None else None
        if compute is not None and dtype is not None and dtype.kind in "biu":
            values = [self._value(v, known) for v in eqn.invars]
            if all(value is not None for value in values):
                known[eqn.outvars[0]] = np.asarray(compute(*values)).astype(dtype)

    def _value(self, var: Any, known: Known) -> np.ndarray | None:
        return np.asarray(var.val) if is_literal(var) else known.get(var)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1))


# Of integers and booleans; the result is cast to the equation's dtype.
_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": np.bitwise_not,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "sign": np.sign,
    "select_n": lambda which, *cases: np.choose(np.asarray(which, np.int64), cases),
    "convert_element_type": np.asarray,
}
