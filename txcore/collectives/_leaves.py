"""What every collective does first: check the axis, check each leaf, and tag the operation.

A collective acts on each leaf of a pytree. Its tag, `op/name.path`, is a scope around the
operation ("txcore[pmean/grads.w]", see `tags.tag_scope`), so that it stands in HLO's op_name
and names the operation in audits, lock files and profiler traces. Tags are no frontend
attributes, which would keep XLA for TPU from combining collectives, nor do they depend on the
process.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from txcore import _compat, tags
from txcore.step_scope import current_scope
from txcore.varying import claim

_NAME = re.compile(r"[A-Za-z0-9_./-]+")


class Leaf(NamedTuple):
    """One array of the tree that a collective was given, and how errors call it."""

    value: jax.Array
    where: str  # "grads['w']", or "x" for a bare array


def check_axes(op: str, axis: Any) -> tuple[str, ...]:
    """Return `axis` as a tuple of names, each of them bound here and named once."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not axes or not all(isinstance(a, str) for a in axes):
        raise TypeError(
            f"tx.{op} needs axis= a mesh axis name or a non-empty tuple of them, got {axis!r}"
        )
    if len(set(axes)) != len(axes):
        raise ValueError(f"tx.{op} needs each mesh axis once, got axis={axis!r}")
    for name in axes:
        if _compat.axis_size(name) is None:
            raise NameError(_describe_unbound(op, name))
        _refuse_vmap_axis(op, name)
    return axes


def names_of(axes: Iterable[str]) -> str:
    """Return axes as one would write them in a call: 'data', or ('data', 'model')."""
    axes = tuple(axes)
    return repr(axes[0] if len(axes) == 1 else axes)


def _refuse_vmap_axis(op: str, axis: str) -> None:
    bound = _compat.bound_axes()
    if axis in bound or not any(map(_compat.tracks_varying, bound)):
        return
    raise ValueError(
        f"tx.{op} over {axis!r}, an axis of jax.vmap, inside a shard_map or step over "
        f"{', '.join(map(repr, bound))}: jax does not track along which axes vmapped values vary "
        "there. Reduce the vmapped dim with jax.numpy outside the vmap, or use "
        "jax.shard_map(..., check_vma=False)"
    )


def _describe_unbound(op: str, axis: str) -> str:
    bound = _compat.bound_axes()
    if not bound:
        return (
            f"tx.{op} needs mesh axis {axis!r}, but no mesh axis is bound here: call it inside "
            "jax.shard_map or a step decorated with @tx.step_fn"
        )
    names = ", ".join(map(repr, bound))
    return f"tx.{op} needs mesh axis {axis!r}, but the axes bound here are {names}: use one of them"


def axes_size(axes: Iterable[str]) -> int:
    """Return the product of the axes' sizes."""
    sizes = (_compat.axis_size(a) for a in axes)
    return int(np.prod([s for s in sizes if s is not None], dtype=np.int64))


def varies_along(x: jax.Array, axis: str) -> bool | None:
    """Tell whether `x` varies along `axis`; None where jax does not track it."""
    if axis in _compat.varying_axes(x):
        return True
    return False if _compat.tracks_varying(axis) else None


def map_leaves(
    op: str, x: Any, fn: Callable[[Leaf], jax.Array], *, name: str | None, verb: str
) -> Any:
    """Apply `fn` to every leaf of `x` under the tag of `op`; `verb` says what it does to one."""
    label = _check_name(op, name)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(x)
    out = []
    for path, value in leaves:
        where = (name or "x") + jax.tree_util.keystr(path)
        leaf = Leaf(_check_leaf(op, value, where, verb), where)
        with tags.tag_scope(_make_tag(op, label, path)):
            out.append(fn(leaf))
    return jax.tree_util.tree_unflatten(treedef, out)


def _check_name(op: str, name: str | None) -> str:
    if name is None:
        return ""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"tx.{op} needs name= of letters, digits and _ . / - only (reports join the tags "
            f"of merged collectives with commas), got {name!r}"
        )
    return name


def _make_tag(op: str, label: str, path: Any) -> str:
    parts = [label] if label else []
    keys = jax.tree_util.keystr(path, simple=True, separator=".")
    parts += [re.sub(r"[^A-Za-z0-9_./-]", "_", keys)] if keys else []
    return "/".join([op, ".".join(parts)] if parts else [op])


def _check_leaf(op: str, value: Any, where: str, verb: str) -> jax.Array:
    if isinstance(value, (bool, int, float, complex)) and verb == "reduce":
        raise TypeError(
            f"tx.{op} needs arrays, got the Python number {value!r} at {where}: it is the same on "
            "every device, so there is nothing to reduce. For the number of devices use "
            "tx.axis_size"
        )
    if _compat.is_key_array(value):
        raise TypeError(
            f"tx.{op} cannot {verb} the PRNG keys at {where}: pass jax.random.key_data(keys) "
            "and wrap the result"
        )
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
        raise TypeError(
            f"tx.{op} needs arrays, got {type(value).__name__} at {where}: remove that leaf or "
            "convert it with jnp.asarray"
        )
    return jnp.asarray(value)


def claim_differing(op: str, leaf: Leaf, axes: tuple[str, ...], *, mean: bool) -> Leaf:
    """Return `leaf` typed as varying along each axis that it is to be reduced over, in a step.

    There jax's type is not the last word: the engine refuses it when it has the whole program, if
    its data are equal. Elsewhere `reduced_axes` refuses it by its type.
    """
    if current_scope() is None:
        return leaf
    value, parts = leaf.value, _compat.unreduced_axes(leaf.value)
    for axis in axes:
        size = _compat.axis_size(axis)
        if size != 1 and axis not in parts and varies_along(value, axis) is False:
            error = _describe_reduced(op, leaf.where, axis, mean=mean)
            value = claim_differs(value, axis, what=leaf.where, error=error)
    return leaf._replace(value=value)


def reduced_axes(op: str, leaf: Leaf, axes: tuple[str, ...], *, mean: bool) -> tuple[str, ...]:
    """Return the axes to reduce `leaf` over; refuse those along which it does not vary.

    An axis of size 1 along which the value does not vary needs no collective. Along an axis
    along which it is unreduced each device holds a part, and this is the sum that it waits for.
    """
    unreduced = _compat.unreduced_axes(leaf.value)
    if unreduced and _compat.unreduced_kind(leaf.value) != "sum":
        refuse_unreduced(op, leaf, axes)
    kept = []
    for axis in axes:
        if axis in unreduced:
            kept.append(axis)
            continue
        size, varying = _compat.axis_size(axis), varies_along(leaf.value, axis)
        if size == 1 and not varying:
            continue
        if varying is False:
            raise ValueError(_describe_reduced(op, leaf.where, axis, mean=mean, source=""))
        kept.append(axis)
    return tuple(kept)


def check_local(op: str, leaf: Leaf, axes: tuple[str, ...]) -> jax.Array:
    """Return a value that `op` averages; refuse one that is reduced already, as `pmean` does."""
    refuse_unreduced(op, leaf, axes)
    if axes:
        leaf = claim_differing(op, leaf, axes, mean=True)
        reduced_axes(op, leaf, axes, mean=True)
    return leaf.value


def _describe_reduced(
    op: str, where: str, axis: str, *, mean: bool, source: str = " ({source})"
) -> str:
    effect = "change nothing" if mean else f"multiply it by {_compat.axis_size(axis)}"
    return (
        f"tx.{op} over axis {axis!r}: {where} does not vary along it{source}: it is reduced "
        f"already, or the same on every device. Another reduction would {effect}: remove one. If "
        f"it is meant all the same, reduce tx.vary(x, {axis!r})"
    )


def claim_differs(x: jax.Array, axis: str, *, what: str, error: str) -> jax.Array:
    """Claim that `x`, typed as equal along `axis`, differs; outside a step its type is believed.

    In the error " ({source})" stands for the line.
    """
    without_line = error.replace(" ({source})", "")
    scope = current_scope()
    if scope is None:
        raise ValueError(without_line)
    scope.doubts.append(without_line)
    return claim(x, "differs", (axis,), what=what, error=error, add=(axis,))


def in_one_state(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Return `x` unreduced along all of `axes` if it is along one: jax reduces from one state."""
    unreduced = _compat.unreduced_axes(x)
    varying = tuple(a for a in axes if a not in unreduced)
    return _compat.cast_to_unreduced(x, varying) if varying and unreduced & {*axes} else x


def refuse_unreduced(op: str, leaf: Leaf, axes: tuple[str, ...]) -> None:
    """Refuse a leaf of which each device holds only a part along one of `axes`."""
    for axis in axes:
        if axis in _compat.unreduced_axes(leaf.value):
            kind = _compat.unreduced_kind(leaf.value)
            by = {"max": "tx.pmax", "min": "tx.pmin"}.get(kind, "tx.psum")
            raise ValueError(
                f"tx.{op} over axis {axis!r}: {leaf.where} is unreduced along it, so that each "
                f"device holds one part of the {kind} that it stands for: reduce it first, by "
                f"{by}(x, {axis!r})"
            )


def differing_axes(op: str, leaf: Leaf, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of `axes` along which the devices may hold different values of `leaf`."""
    refuse_unreduced(op, leaf, axes)

    def is_equal_along(axis: str) -> bool:
        varying = varies_along(leaf.value, axis)
        return varying is False or (varying is None and _compat.axis_size(axis) == 1)

    return tuple(a for a in axes if not is_equal_along(a))


def moved_axes(op: str, leaf: Leaf, axes: tuple[str, ...]) -> tuple[jax.Array, tuple[str, ...]]:
    """Return `leaf` varying along each axis of size > 1, and those axes.

    Along an axis of size 1 there is nobody to exchange with, so it is left out.
    """
    refuse_unreduced(op, leaf, axes)
    kept = tuple(a for a in axes if _compat.axis_size(a) != 1)
    return vary_leaf(leaf.value, kept), kept


def vary_leaf(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Cast `x` to vary along those of `axes` that it does not vary along yet."""
    missing = tuple(a for a in axes if varies_along(x, a) is False)
    return _compat.cast_to_varying(x, missing) if missing else x


def mean_dtype(dtype: Any) -> np.dtype:
    """Return the dtype in which values are summed for their mean: their mean's, or wider.

    As `jnp.mean` does: integers are made floating point before the sum, and floats of a smaller
    range than float32's (float16, the 8 bit ones) are summed in float32, since the sum of numbers
    whose mean is one of them may be beyond the largest. bfloat16 has float32's range.
    """
    mean = _dtype_of_mean(dtype)
    is_narrow = jnp.finfo(mean).maxexp < jnp.finfo(jnp.float32).maxexp
    return np.dtype(jnp.float32) if is_narrow else mean


def _dtype_of_mean(dtype: Any) -> np.dtype:
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.dtype(dtype)
    quotient = jax.eval_shape(lambda x: x / 1, jax.ShapeDtypeStruct((), dtype))
    return np.dtype(quotient.dtype)


def mean_of(
    value: jax.Array, axes: tuple[str, ...], add: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Return add(value) / the axes' size, floating point, summed in `mean_dtype`."""
    total = add(value.astype(mean_dtype(value.dtype)))
    mean = total / axes_size(axes) if axes else total
    return mean.astype(_dtype_of_mean(value.dtype))


def check_dim(op: str, option: str, dim: Any, leaf: Leaf) -> int:
    """Return `dim` counted from the front; refuse one that `leaf` does not have."""
    ndim = leaf.value.ndim
    if not isinstance(dim, int) or isinstance(dim, bool) or not -ndim <= dim < ndim:
        raise ValueError(
            f"tx.{op} needs {option}= a dim of {leaf.where}, which has shape "
            f"{leaf.value.shape}, got {dim!r}"
            + ("; give a scalar a dim with x[None]" if ndim == 0 else "")
        )
    return dim % ndim


def check_divisible(op: str, option: str, dim: int, leaf: Leaf, axes: tuple[str, ...]) -> None:
    """Refuse a dim that the axes' size does not divide."""
    size, length = axes_size(axes), leaf.value.shape[dim]
    if length % size:
        names = ", ".join(map(repr, axes))
        raise ValueError(
            f"tx.{op} over {names} needs {option}={dim} of {leaf.where} divisible by {size}, got "
            f"shape {leaf.value.shape}: pad it to {-(-length // size) * size}"
        )
