"""ppermute and shift: send a whole value from device to device."""

import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from txcore import _compat, varying
from txcore.collectives import _leaves
from txcore.collectives._calls import explain_calls
from txcore.collectives._leaves import Leaf

Pairs = tuple[tuple[int, int], ...]


@explain_calls
def ppermute(
    x: Any,
    axis: str | tuple[str, ...],
    perm: Iterable[tuple[int, int]],
    *,
    name: str | None = None,
) -> Any:
    """Send `x` from device to device along `axis` by the pairs (source, destination).

    Equation: `y[d] = x[s]` for each (s, d) in `perm`, and 0 where nobody sends.

    Transpose: `ppermute` with every pair reversed.

    Args:
      x: pytree of arrays, any shape.
      axis: mesh axis name, or a tuple of names counted in row-major order.
      perm: pairs of indices along `axis`; each source once, each destination once.
      name: label of the operation's tag; letters, digits and `_ . / -`.

    Returns:
      What this device received, with the structure, shapes and dtypes of `x`.

    Raises:
      ValueError: `perm` names an index twice on one side, or one that does not exist.
      TypeError: a leaf is no array, or `perm` holds something else than pairs of ints.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x):
      ...     return tx.ppermute(x, "data", [(0, 1), (1, 2)])
      >>> tx.testing.run_sharded(f, np.arange(1.0, 4.0), axes={"data": 3})
      array([0., 1., 2.], dtype=float32)
    """
    axes = _leaves.check_axes("ppermute", axis)
    return _permute_leaves("ppermute", x, axes, _check_perm(perm, axes), name)


@explain_calls
def shift(
    x: Any,
    axis: str | tuple[str, ...],
    by: int = 1,
    wrap: bool = True,
    *,
    name: str | None = None,
) -> Any:
    """Send `x` to the device `by` places further along `axis`.

    Equation: `y[i] = x[(i - by) mod n]`; without `wrap`, 0 where `i - by` is no index.

    Transpose: `shift` by `-by`.

    Args:
      x: pytree of arrays, any shape.
      axis: mesh axis name, or a tuple of names counted in row-major order.
      by: places to move; negative moves towards index 0.
      wrap: whether the last device sends to the first (a ring) or to nobody (a line).
      name: label of the operation's tag; letters, digits and `_ . / -`.

    Returns:
      What this device received, with the structure, shapes and dtypes of `x`.

    Raises:
      TypeError: a leaf is no array, or `by` is no int.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x):
      ...     return tx.shift(x, "data")
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 4})
      array([3., 0., 1., 2.], dtype=float32)
    """
    axes = _leaves.check_axes("shift", axis)
    size = _leaves.axes_size(axes)
    try:
        by = operator.index(by)
    except TypeError:
        raise TypeError(f"tx.shift needs by= an int, got {by!r}") from None
    moves = ((i, i + by) for i in range(size))
    perm = tuple((i, j % size) for i, j in moves if wrap or 0 <= j < size)
    return _permute_leaves("shift", x, axes, perm, name)


def _permute_leaves(op: str, x: Any, axes: tuple[str, ...], perm: Pairs, name: str | None) -> Any:
    axes, perm = _in_mesh_order(axes, perm)

    def permute_leaf(leaf: Leaf) -> jax.Array:
        value, kept = _leaves.moved_axes(op, leaf, axes)
        if kept:
            return _send_leaf(value, kept, perm)
        # A group of one: what it sends itself, or zeros of the same type.
        return value if perm else varying.match_varying(jnp.zeros_like(value), value)[0]

    return _leaves.map_leaves(op, x, permute_leaf, name=name, verb="send")


def _send_leaf(x: jax.Array, axes: tuple[str, ...], perm: Pairs) -> jax.Array:
    if len(perm) == _leaves.axes_size(axes) or set(axes) <= set(_compat.bound_axes()):
        return lax.ppermute(x, axes, perm)
    # Over an axis of vmap jax needs a whole permutation: complete it, then zero what came.
    indices = range(_leaves.axes_size(axes))
    silent = [r for r in indices if r not in dict(perm)]
    receivers = [d for _, d in perm]
    others = [r for r in indices if r not in receivers]
    y = lax.ppermute(x, axes, perm + tuple(zip(silent, others, strict=True)))
    received = jnp.isin(lax.axis_index(axes), jnp.array(receivers, jnp.int32))
    return jnp.where(received, y, jnp.zeros_like(y))


def _in_mesh_order(axes: tuple[str, ...], perm: Pairs) -> tuple[tuple[str, ...], Pairs]:
    """Count the indices of `perm` by the mesh's order of axes: jax 0.12 accepts no other."""
    order = _compat.bound_axes()
    if not set(axes) <= set(order):
        return axes, perm
    ordered = tuple(sorted(axes, key=order.index))
    indices = np.arange(_leaves.axes_size(axes))
    grid = indices.reshape([_compat.axis_size(a) or 1 for a in ordered])
    # renamed[index in the given order] = index in the mesh's order
    renamed = grid.transpose([ordered.index(a) for a in axes]).reshape(-1)
    return ordered, tuple((int(renamed[s]), int(renamed[d])) for s, d in perm)


def _check_perm(perm: Iterable[tuple[int, int]], axes: tuple[str, ...]) -> Pairs:
    try:
        pairs = tuple((operator.index(s), operator.index(d)) for s, d in perm)
    except (TypeError, ValueError):
        raise TypeError(
            f"tx.ppermute needs perm= pairs (source, destination) of ints, got {perm!r}"
        ) from None
    size = _leaves.axes_size(axes)
    for side, indices in (
        ("source", [s for s, _ in pairs]),
        ("destination", [d for _, d in pairs]),
    ):
        for index in indices:
            if not 0 <= index < size:
                raise ValueError(
                    f"tx.ppermute over {', '.join(map(repr, axes))} needs indices 0 to {size - 1}, "
                    f"got {side} {index} in perm={pairs}"
                )
        if len(set(indices)) != len(indices):
            twice = next(r for r in indices if indices.count(r) > 1)
            raise ValueError(
                f"tx.ppermute needs each {side} once, got {twice} more than once in perm={pairs}"
                + ("; to send to several use tx.broadcast" if side == "source" else "")
            )
    return pairs
