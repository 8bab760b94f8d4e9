"""What the Pallas kernels of a traced program move and compute, and how long a GPU needs at least.

The counts are of the kernels' own code, one program after the other: bytes of its loads and
stores, products of its matrix units, and elementwise operations. Nothing is run or measured.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import jax
import numpy as np

from txcore import _compat

_LOADS = ("get", "masked_load")
_STORES = ("swap", "masked_swap")
_SPECIAL = ("exp", "exp2", "log", "tanh", "logistic", "sqrt", "rsqrt", "div", "log1p", "expm1")
_COMPUTES = frozenset(
    {
        *("add", "sub", "mul", "neg", "max", "min", "abs", "select_n", "integer_pow", "square"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "rem", "sign"),
        *("shift_left", "shift_right_logical", "shift_right_arithmetic", "reduce_sum"),
        *("reduce_max", "reduce_min"),
    }
)


@dataclass(frozen=True)
class Gpu:
    """Hold what a GPU does in a second at most, all of its multiprocessors together.

    Attributes:
      memory: bytes to or from its memory.
      loads: bytes that its multiprocessors load and store, wherever they lie.
      half_products: FLOPs of matrix products of 16-bit factors, on tensor cores.
      floats: FLOPs in float32, without tensor cores.
      integers: operations on 32-bit integers.
      special: exponentials, roots and quotients.
    """

    memory: float
    loads: float
    half_products: float
    floats: float
    integers: float
    special: float


def _multiprocessors(count: int, clock: float, memory: float, half_products: float) -> Gpu:
    """Return a GPU whose multiprocessors have a compute capability of 9.0.

    CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions": in a clock 128
    multiply-adds, 64 integer operations, 16 special functions; 128 bytes of L1 (H100 white paper).
    """
    clocks = count * clock
    return Gpu(memory, 128 * clocks, half_products, 256 * clocks, 64 * clocks, 16 * clocks)


# NVIDIA's data sheets of the SXM cards: multiprocessors, boost clock, memory, dense bfloat16.
GPUS: Mapping[str, Gpu] = {
    "H100": _multiprocessors(132, 1.98e9, 3350e9, 989.4e12),
    "H200": _multiprocessors(132, 1.98e9, 4800e9, 989.4e12),
}


@dataclass(frozen=True)
class Counts:
    """Hold what one launch of a kernel does, all programs together.

    Attributes:
      memory: bytes of its arrays, each once; at most those of its loads and stores.
      loads: bytes of its loads and stores. Those outside of an array or a mask count too.
      half_products: FLOPs of matrix products of 16-bit factors.
      floats: FLOPs elsewhere: elementwise, and products of wider factors.
      integers: operations on integers and truth values, most of them on indices.
      special: exponentials, roots and quotients.
    """

    memory: int = 0
    loads: int = 0
    half_products: int = 0
    floats: int = 0
    integers: int = 0
    special: int = 0


def count_kernels(jaxpr: Any) -> list[Counts]:
    """Count each Pallas kernel that a traced program launches.

    A kernel's first program stands for all of them: a run that is cut off at an array's end counts
    as a whole one.

    Args:
      jaxpr: as `jax.jit(f).trace(*args).jaxpr`.

    Returns:
      The counts of each launch, in the program's order.

    Example:
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> def norm(x):
      ...     return kernels.squared_norm(x, implementation="pallas")
      >>> [found] = count_kernels(jax.jit(norm).trace(jnp.ones(65536)).jaxpr)
      >>> found.loads, found.floats  # an element has 4 bytes, a product and a sum
      (262148, 131072)
    """
    live = _compat.live_jaxpr(getattr(jaxpr, "jaxpr", jaxpr))
    found = []
    for eqn, often in _list_launches(live, 1):
        programs = prod(int(size) for size in eqn.params["grid_mapping"].grid)
        total = _times(programs, _count(eqn.params["jaxpr"], {}))
        arrays = sum(map(_bytes_of, (*eqn.invars, *eqn.outvars)))
        found += [Counts(memory=min(arrays, total["loads"]), **total)] * often
    return found


def _list_launches(jaxpr: Any, often: int) -> Iterator[tuple[Any, int]]:
    """Yield each launch of a program, and how often its loops repeat it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn, often
            continue
        turns = 1
        if eqn.primitive.name == "scan":
            turns = eqn.params["length"]
        elif eqn.primitive.name == "while":
            turns = _turns_of(eqn, {})
        for inner in _jaxprs_in(eqn):
            yield from _list_launches(inner, often * turns)


def _jaxprs_in(eqn: Any) -> list[Any]:
    from jax.extend.core import jaxprs_in_params

    return list(jaxprs_in_params(eqn.params))


Known = dict[Any, Any]  # the scalars whose values the first program knows


def _count(jaxpr: Any, known: Known) -> Counter[str]:
    """Count what the first program of a kernel does, and learn the scalars that it knows."""
    total: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        total += _count_equation(eqn, known)
    return total


def _count_equation(eqn: Any, known: Known) -> Counter[str]:
    name = eqn.primitive.name
    if name == "program_id":
        known[eqn.outvars[0]] = np.int32(0)
        return Counter()
    if name in _LOADS:
        return Counter(loads=_bytes_of(eqn.outvars[0]))
    if name in _STORES:
        return Counter(loads=_bytes_of(eqn.outvars[0]))  # what was there before has its shape
    if name == "dot_general":
        return _count_product(eqn)
    if name == "scan":
        return _times(eqn.params["length"], _count(eqn.params["jaxpr"].jaxpr, {}))
    if name == "while":
        return _times(_turns_of(eqn, known), _count(eqn.params["body_jaxpr"].jaxpr, {}))
    if name == "cond":
        return _count_branches(eqn, known)
    inner = _jaxprs_in(eqn)
    if inner:
        values = [_value_of(atom, known) for atom in eqn.invars]
        body = inner[0]
        learned = {v: x for v, x in zip(body.invars, values, strict=False) if x is not None}
        total = _count(body, learned)
        results = (_value_of(atom, learned) for atom in body.outvars)
        known |= {v: x for v, x in zip(eqn.outvars, results, strict=True) if x is not None}
        return total
    _learn_scalars(eqn, known)
    return _count_elementwise(eqn)


def _times(often: int, counts: Counter[str]) -> Counter[str]:
    return Counter({name: often * count for name, count in counts.items()})


def _value_of(atom: Any, known: Known) -> Any:
    """Return the value of a literal or of a scalar that is known; None of any other."""
    return atom.val if hasattr(atom, "val") else known.get(atom)


def _learn_scalars(eqn: Any, known: Known) -> None:
    """Compute an equation on scalars that are known."""
    values = [_value_of(atom, known) for atom in eqn.invars]
    if any(v.aval.shape for v in eqn.outvars) or any(v is None for v in values):
        return
    results = eqn.primitive.bind(*map(np.asarray, values), **eqn.params)
    results = results if eqn.primitive.multiple_results else [results]
    known |= dict(zip(eqn.outvars, map(np.asarray, results), strict=True))


def _turns_of(eqn: Any, known: Known) -> int:
    """Return the turns of a `fori_loop`, whose carry starts with its counter and its end."""
    constants = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    start, end = (_value_of(atom, known) for atom in eqn.invars[constants : constants + 2])
    if start is None or end is None:
        raise ValueError("a loop around or in a kernel needs bounds that its first program knows")
    return max(0, int(end) - int(start))


def _count_branches(eqn: Any, known: Known) -> Counter[str]:
    """Count the branch that the first program takes; where that is not known, the longest."""
    branches = [_count(branch.jaxpr, {}) for branch in eqn.params["branches"]]
    index = _value_of(eqn.invars[0], known)
    return max(branches, key=lambda c: c["loads"]) if index is None else branches[int(index)]


def _count_product(eqn: Any) -> Counter[str]:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval, eqn.outvars[0].aval
    flops = 2 * out.size * prod(left.shape[d] for d in contracted)
    return Counter({"half_products" if left.dtype.itemsize == 2 else "floats": flops})


def _count_elementwise(eqn: Any) -> Counter[str]:
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    largest = max([out.size, *(v.aval.size for v in eqn.invars)])
    if name in _SPECIAL and np.issubdtype(out.dtype, np.floating):
        return Counter(special=largest)
    if name not in _COMPUTES and name != "div":
        return Counter()
    floats = name == "select_n" or _is_float(eqn.invars[0].aval.dtype)
    return Counter({"floats" if floats else "integers": largest})


def _is_float(dtype: Any) -> bool:
    return bool(jax.numpy.issubdtype(dtype, jax.numpy.floating))


def _bytes_of(variable: Any) -> int:
    return int(variable.aval.size * variable.aval.dtype.itemsize)


def seconds_by_limit(counts: Counts, gpu: Gpu) -> dict[str, float]:
    """Return how long each part of a GPU needs at its peak for what a kernel does.

    The kernel takes at least the longest of them.

    Args:
      counts: of one launch.
      gpu: one of `GPUS`, say.
    """
    return {f.name: getattr(counts, f.name) / getattr(gpu, f.name) for f in fields(counts)}
