"""What jax's types say of varying, reduced and unreduced values, on each version."""

from typing import Any

import jax
from jax import lax


def varying_axes(x: Any) -> frozenset[str]:
    """Return the mesh axes along which the type of `x` says that it varies."""
    return varying_axes_of(jax.typeof(x))


def varying_axes_of(aval: Any) -> frozenset[str]:
    """Return the mesh axes along which an array type says that its values vary."""
    manual = getattr(aval, "manual_axis_type", None)
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(getattr(aval, "vma", None) or ())


def unreduced_axes(x: Any) -> frozenset[str]:
    """Return the mesh axes along which each device holds one part of `x`, yet to be reduced."""
    return frozenset(getattr(_axis_type(x), "unreduced", ()))


def equal_reduced_axes(x: Any) -> frozenset[str]:
    """Return the mesh axes along which `x` is equal and its cotangent is unreduced ("reduced")."""
    return frozenset(getattr(_axis_type(x), "reduced", ()))


def unreduced_kind(x: Any) -> str:
    """Return how the parts of an unreduced value are reduced: "sum", or since jax 0.11 "max"."""
    kind = getattr(_axis_type(x), "unreduced_kind", None)
    return getattr(kind, "name", "sum")


def _axis_type(x: Any) -> Any:
    return getattr(jax.typeof(x), "manual_axis_type", None)


def cast_to_varying(x: Any, axes: tuple[str, ...]) -> jax.Array:
    """Cast one array to vary along `axes`, none of which it varies along yet."""
    reduced = equal_reduced_axes(x)
    for same_state in ([a for a in axes if a not in reduced], [a for a in axes if a in reduced]):
        if same_state:  # jax casts from one state at a time
            x = lax.pcast(x, tuple(same_state), to="varying")
    return x


def cast_to_unreduced(x: Any, axes: tuple[str, ...]) -> jax.Array:
    """Cast one array that varies along `axes` to be unreduced along them: parts of a sum."""
    return lax.pcast(x, axes, to="unreduced")


def tracks_varying(axis: str) -> bool:
    """Tell whether jax tracks varying axes here (not under check_vma=False or vmap)."""
    # The index along an axis varies along it by definition: if its type does not say so,
    # nothing's type does.
    if axis not in bound_axes():  # an axis of vmap: its index is typed, its data is not
        return False
    index = jax.eval_shape(lambda: lax.axis_index(axis))
    return axis in varying_axes(index)


def axis_size(axis: str) -> int | None:
    """Return the size of mesh axis `axis`, or None where it is not bound."""
    try:
        return int(lax.axis_size(axis))
    except NameError:
        return None


def all_gather_invariant(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Gather shards that vary along `axes`; the result is typed as invariant where jax tracks."""
    # jax 0.10 refuses to="invarying" under vmap, where nothing is tracked.
    to = "invarying" if set(axes) <= varying_axes(x) else "varying"
    return lax.all_gather(x, axes, axis=dim, tiled=True, to=to)


def bound_axes() -> tuple[str, ...]:
    """Return the mesh axes that are bound (manual) where this is called, in the mesh's order."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = getattr(mesh, "manual_axes", ())
    return tuple(str(a) for a in mesh.axis_names if a in manual)


def is_vmapped(x: Any) -> bool:
    """Tell whether `x` is one row of what jax.vmap goes over, as far as this jax shows it."""
    from jax._src.interpreters import batching  # private: no public question exists

    tracer = getattr(batching, "BatchTracer", ())
    while x is not None and not isinstance(x, tracer):
        x = getattr(x, "primal", None)  # under differentiation
    return x is not None


def shape_like(x: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's result: of this shape, varying along the same axes as `x`."""
    axes = getattr(jax.typeof(x), "manual_axis_type", None)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
