"""broadcast: every device gets the value of one."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from txcore import _compat
from txcore.collectives import _leaves
from txcore.collectives._calls import explain_calls
from txcore.collectives._leaves import Leaf


@explain_calls
def broadcast(
    x: Any, axis: str | tuple[str, ...], root: int = 0, *, name: str | None = None
) -> Any:
    """Give every device along `axis` the value of the device `root`.

    Equation: `y[i] = x[root]`, as `psum(where(axis_index == root, x, 0))`: an all-reduce, for
    which jax has an invariant type and a transpose on every platform. The result is invariant.

    Transpose: the cotangent arrives at `root`; the other devices get 0. With check_vma=False
    the sum of all devices' cotangents does.

    Args:
      x: pytree of arrays, any shape. A leaf that does not vary along an axis is the root's
        value there already and needs no collective.
      axis: mesh axis name, or a tuple of names counted in row-major order.
      root: index along `axis` whose value is taken.
      name: label of the operation's tag; letters, digits and `_ . / -`.

    Returns:
      The root's values, with the structure, shapes and dtypes of `x`. NaN on other devices
      does not spread.

    Raises:
      ValueError: `root` is no index along `axis`.
      TypeError: a leaf is no array, or `root` is no int.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x):
      ...     return tx.broadcast(x, "data", root=2)
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 4}, out_specs=P())
      array([2.], dtype=float32)
    """
    axes = _leaves.check_axes("broadcast", axis)
    coordinates = _root_coordinates(root, axes)

    def broadcast_leaf(leaf: Leaf) -> jax.Array:
        at = {a: coordinates[a] for a in _leaves.differing_axes("broadcast", leaf, axes)}
        return _masked_psum(leaf.value, at) if at else leaf.value

    return _leaves.map_leaves("broadcast", x, broadcast_leaf, name=name, verb="broadcast")


def _root_coordinates(root: int, axes: tuple[str, ...]) -> dict[str, int]:
    try:
        index = operator.index(root)
    except TypeError:
        raise TypeError(f"tx.broadcast needs root= an int, got {root!r}") from None
    size = _leaves.axes_size(axes)
    if not 0 <= index < size:
        names = ", ".join(map(repr, axes))
        raise ValueError(f"tx.broadcast over {names} needs root= 0 to {size - 1}, got {index}")
    shape = tuple(_compat.axis_size(a) or 1 for a in axes)
    return {a: int(c) for a, c in zip(axes, np.unravel_index(index, shape), strict=True)}


def _masked_psum(x: jax.Array, root: dict[str, int]) -> jax.Array:
    is_root = jnp.bool_(True)
    for axis, coordinate in root.items():
        is_root = is_root & (lax.axis_index(axis) == coordinate)
    data = x.astype(jnp.int8) if x.dtype == jnp.bool_ else x
    masked = jnp.where(is_root, data, jnp.zeros_like(data))
    return lax.psum(masked, tuple(root)).astype(x.dtype)
