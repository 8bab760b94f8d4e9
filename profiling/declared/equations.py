"""Describe the equations of a traced program: their names, axes, paths and inner programs.

This is the one module that knows jax's primitives by name; the walks ask it what one does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from txcore import _compat
from txcore.profiling import meshes

# jax.extend.core has these classes, but importing it imports all of Pallas.
Jaxpr: TypeAlias = Any
Eqn: TypeAlias = Any
Var: TypeAlias = Any

# Collectives by the HLO op that they lower to; a "_start" of an async pair is the same.
_KINDS = {
    "all-reduce": (
        *("psum", "psum2", "psum_invariant", "pmax", "pmin"),
        *("unreduced_psum", "unreduced_pmax", "unreduced_pmin"),
    ),
    "all-gather": ("all_gather", "all_gather_invariant", "all_gather_reduced"),
    "reduce-scatter": ("reduce_scatter", "unreduced_reduce_scatter"),
    "all-to-all": ("all_to_all",),
    "ragged-all-to-all": ("ragged_all_to_all",),
    "collective-permute": ("ppermute", "psend"),  # a precv is the other half
    "collective-broadcast": ("pbroadcast",),
}
KIND_OF = {primitive: kind for kind, names in _KINDS.items() for primitive in names}

BRANCHING = ("cond", "while")
SUMS = ("psum", "psum_invariant", "reduce_scatter")
ALL_REDUCED_SUMS = ("psum", "psum_invariant", "unreduced_psum")
GATHERS = _KINDS["all-gather"]
# Their results are equal on all devices of the axis.
EQUALIZERS = (*_KINDS["all-reduce"], "pbroadcast")
# They change the axes along which a value is typed as varying, and leave the value as it is.
VARYING_CASTS = ("pvary", "pcast")
CASTS = (
    *VARYING_CASTS,
    *("preduced", "reduced_vary_cast", "vary_unreduced_cast", "vary_unreduced_cast_p"),
)
REFS = ("get", "swap")
KERNELS = ("pallas_call", "core_map", "mpmd_map")  # their bodies hold no collectives
OPAQUE = (*KERNELS, *REFS, "ffi_call", "io_callback")

# They move or copy the elements of their first operand: no arithmetic.
MOVES = frozenset(
    ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "transpose", "copy", "rev")
    + ("expand_dims", "reduce_precision", "optimization_barrier", "name", "sharding_constraint")
)
# Linear in all operands together: each term of a sum goes through by itself.
ADDITIVE = frozenset(("add", "add_any", "sub", "neg", "reduce_sum", "concatenate", "pad")) | MOVES
# Not linear: their result of a term is not a term of their result of the sum.
NOT_LINEAR = frozenset(
    ("integer_pow", "pow", "square", "abs", "sign", "sqrt", "rsqrt", "exp", "log", "max", "min")
    + ("eq", "ne", "lt", "le", "gt", "ge", "reduce_max", "reduce_min", "argmax", "argmin")
    + ("tanh", "logistic", "erf", "sin", "cos", "clamp", "round", "floor", "ceil", "is_finite")
)
PRODUCTS = ("mul", "div", "dot_general")
# Most equations are these: they name no mesh axis and hold no jaxpr.
PLAIN = frozenset(
    ("add", "sub", "mul", "div", "neg", "max", "min", "exp", "log", "tanh", "logistic", "erf")
    + ("integer_pow", "pow", "sqrt", "rsqrt", "square", "sign", "abs", "sin", "cos", "add_any")
    + ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "select_n", "stop_gradient")
    + ("dot_general", "conv_general_dilated", "broadcast_in_dim", "reshape", "transpose")
    + ("convert_element_type", "squeeze", "slice", "pad", "concatenate", "iota", "copy")
    + ("dynamic_slice", "dynamic_update_slice", "gather", "reduce_sum", "reduce_max", "rev")
)
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min")
_Parts: TypeAlias = tuple[tuple[str, ...], ...]  # of each dim, the mesh axes that it is split over
_NO_JAXPRS = frozenset({int, float, bool, str, type(None), np.dtype, frozenset})


def name_of(eqn: Eqn) -> str:
    """Return the name of an equation's primitive; the start of an async pair has the op's."""
    return str(eqn.primitive.name).removesuffix("_start")


def is_literal(var: Var) -> bool:
    """Tell whether an input of an equation is a constant that is written into it."""
    return hasattr(var, "val")


def open_jaxpr(jaxpr: Jaxpr) -> Jaxpr:
    """Return the Jaxpr inside of a ClosedJaxpr; a Jaxpr is returned as it is."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def sub_jaxprs(eqn: Eqn) -> list[Jaxpr]:
    """Return the jaxprs in an equation's parameters, a kernel's body left out."""
    if eqn.primitive.name in KERNELS:
        return []
    found: list[Jaxpr] = []
    for parameter in eqn.params.values():
        # Most parameters are of types that hold none: testing the type is faster than hasattr.
        if type(parameter) not in _NO_JAXPRS:
            ones = parameter if isinstance(parameter, tuple | list) else (parameter,)
            found += [inner for inner in map(open_jaxpr, ones) if hasattr(inner, "eqns")]
    return found


def has_any(jaxpr: Jaxpr, names: Sequence[str]) -> bool:
    """Tell whether a primitive of these names stands in a jaxpr, or inside of its equations."""
    return any(
        name_of(eqn) in names or any(has_any(inner, names) for inner in sub_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


def axes_of(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the axis names in a collective's parameters, in order, positions left out."""
    named = params.get("axes", params.get("axis_name", ()))
    return tuple(a for a in (named if isinstance(named, tuple) else (named,)) if type(a) is str)


def axes_of_spec(spec: Any) -> tuple[str, ...]:
    """Return the mesh axes that a PartitionSpec names, in order."""
    names: list[str] = []
    for part in _compat.spec_entries(spec):
        names += part if isinstance(part, tuple) else [part] if part is not None else []
    return tuple(names)


def sizes_of(eqn: Eqn) -> meshes.Sizes:
    """Return the axes of a shard_map's mesh and their sizes, in order."""
    return meshes.sizes_of(eqn.params["mesh"])


def manual_axes_of(eqn: Eqn) -> frozenset[str]:
    """Return the axes that a shard_map makes manual."""
    return frozenset(eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes", ())))


def meshes_of(jaxpr: Jaxpr) -> tuple[meshes.Sizes, ...]:
    """List the meshes of a program's shard_maps, each once, outermost first."""
    found = []
    for eqn in open_jaxpr(jaxpr).eqns:
        if eqn.primitive.name == "shard_map":
            found.append(sizes_of(eqn))
        for inner in sub_jaxprs(eqn):
            found += meshes_of(inner)
    return tuple(dict.fromkeys(found))


def is_one_shard_map(jaxpr: Jaxpr) -> bool:
    """Tell whether a program is one shard_map over all axes: the partitioner decides nothing."""
    eqns = open_jaxpr(jaxpr).eqns
    if len(eqns) != 1:
        return False
    (eqn,) = eqns
    if eqn.primitive.name == "shard_map":
        manual = manual_axes_of(eqn)
        return all(size == 1 or name in manual for name, size in sizes_of(eqn))
    return eqn.primitive.name in ("jit", "pjit") and is_one_shard_map(sub_jaxprs(eqn)[0])


def path_of(eqn: Eqn, outer: str) -> str:
    """Return the jax transformations that made an equation, `outer` being those around it."""
    return f"{outer}/{_compat.eqn_name_stack(eqn)}"


def made_by_autodiff(path: str) -> bool:
    """Tell from its path whether autodiff's transposition made an op.

    A forward pass that is rematerialized runs inside a transposed one, but the user wrote it.
    """
    return "transpose(" in path and "rematted_computation" not in path


@dataclass(frozen=True)
class Asked:
    """What an `out_sharding=` asks for.

    Attributes:
      sizes: the mesh.
      sums: the axes over which the devices' parts are summed.
      elements: of such a part.
      moves: whether the result has to lie otherwise than the operands do.
    """

    sizes: meshes.Sizes
    sums: tuple[str, ...]
    elements: int
    moves: bool


def read_out_sharding(eqn: Eqn) -> Asked | None:
    """Return what an equation's `out_sharding=` asks for; None without one, or for nothing.

    Under an Explicit mesh jax wants it written where a result may lie in several ways: of a product
    over a sharded dim, `out_sharding=P(None, None)` is an all-reduce, `P("X", None)` a
    reduce-scatter. So the line that writes it asks for that sum by name, as `jax.reshard` does.
    """
    target = eqn.params.get("sharding" if eqn.primitive.name == "reshape" else "out_sharding")
    spec = getattr(target, "spec", None)
    found = _lie_of_result(eqn) if spec is not None else None
    if target is None or found is None:
        return None
    summed, parts = found
    result = eqn.outvars[0].aval
    wanted = _parts_of(spec, result.ndim)
    if len(parts) != len(wanted):
        return None  # a form of the operation that is not known here: nothing is asked for
    sizes = meshes.sizes_of(target.mesh)
    count = dict(sizes)
    left = getattr(spec, "unreduced", ())
    sums = tuple(a for a, n in sizes if n > 1 and a in summed and a not in left)
    moves = any(
        count.get(axis, 1) > 1 and axis not in there
        for here, there in zip(parts, wanted, strict=True)
        for axis in here
    )
    if not (sums or moves):
        return None
    shards = math.prod(count.get(axis, 1) for here in parts for axis in here)
    return Asked(sizes, sums, result.size // max(shards, 1), moves)


def _lie_of_result(eqn: Eqn) -> tuple[tuple[str, ...], _Parts] | None:
    """Return the axes whose devices hold parts of sums, and how the result lies without moves."""
    name = eqn.primitive.name
    given = [_parts_of_aval(v.aval) for v in eqn.invars]
    if name == "dot_general":
        (of_left, of_right), (batch, _) = eqn.params["dimension_numbers"]
        left, right, *_ = given
        summed = [
            a for i, j in zip(of_left, of_right, strict=True) for a in left[i] if a in right[j]
        ]
        free_left = [left[i] for i in range(len(left)) if i not in (*of_left, *batch)]
        other = (*of_right, *eqn.params["dimension_numbers"][1][1])
        free_right = [right[j] for j in range(len(right)) if j not in other]
        return tuple(summed), (*(left[i] for i in batch), *free_left, *free_right)
    if name in _REDUCTIONS:
        dims = eqn.params["axes"]
        kept = tuple(p for i, p in enumerate(given[0]) if i not in dims)
        return tuple(a for i in dims for a in given[0][i]), kept
    if name == "reshape":
        # Which dims a reshape makes of which is not followed: all that is split may have to move.
        axes = tuple(axis for part in given[0] for axis in part)
        ndim = eqn.outvars[0].aval.ndim
        return (), (axes, *((),) * (ndim - 1)) if ndim else ()
    return None


def _parts_of_aval(aval: Any) -> _Parts:
    given = getattr(aval, "sharding", None)
    spec = getattr(given, "spec", ())
    return _parts_of(spec, getattr(aval, "ndim", 0))


def _parts_of(spec: Any, ndim: int) -> _Parts:
    entries = _compat.spec_entries(spec)
    parts = [p if isinstance(p, tuple) else (p,) if isinstance(p, str) else () for p in entries]
    return (*parts, *((),) * (ndim - len(parts)))
