"""pmax and pmin: largest and smallest over the devices of an axis."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from txcore import _compat
from txcore.collectives import _leaves
from txcore.collectives._calls import explain_calls
from txcore.collectives._leaves import Leaf


@explain_calls
def pmax(x: Any, axis: str | tuple[str, ...], *, name: str | None = None) -> Any:
    """Take the elementwise maximum over all devices along `axis` (all-reduce).

    Equation: `y[i] = max_j x[j]`. The result is invariant along `axis`.

    Transpose: none, it is not linear, and jax defines no derivative: put
    `jax.lax.stop_gradient` around the argument, `pmax(stop_gradient(x), axis)`, as a stable
    log-sum-exp does. Around the result it comes too late: jax differentiates `pmax` first.

    Args:
      x: pytree of real arrays, any shape. A leaf that does not vary along an axis is its
        own maximum there and needs no collective.
      axis: mesh axis name, or a tuple of names.
      name: label of the operation's tag; letters, digits and `_ . / -`.

    Returns:
      The maxima, with the structure, shapes and dtypes of `x`.

    Raises:
      TypeError: a leaf is no array.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x):
      ...     return tx.pmax(x, "data")
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 4}, out_specs=P())
      array([3.], dtype=float32)
      >>> def log_sum_exp(x):  # its gradient, the softmax, goes through the sum alone
      ...     largest = tx.pmax(jax.lax.stop_gradient(x), "data")
      ...     return (jax.numpy.log(tx.psum(jax.numpy.exp(x - largest), "data")) + largest).sum()
      >>> gradient = jax.grad(log_sum_exp)
      >>> tx.testing.run_sharded(gradient, np.arange(2.0), axes={"data": 2}).round(4)
      array([0.2689, 0.7311], dtype=float32)
    """
    return _reduce_to_extreme("pmax", x, axis, name, lax.pmax)


@explain_calls
def pmin(x: Any, axis: str | tuple[str, ...], *, name: str | None = None) -> Any:
    """Take the elementwise minimum over all devices along `axis` (all-reduce).

    Equation: `y[i] = min_j x[j]`. The result is invariant along `axis`.

    Transpose: none; see `pmax`.

    Args:
      x: pytree of real arrays, any shape, as for `pmax`.
      axis: mesh axis name, or a tuple of names.
      name: label of the operation's tag; letters, digits and `_ . / -`.

    Returns:
      The minima, with the structure, shapes and dtypes of `x`.

    Raises:
      TypeError: a leaf is no array.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x):
      ...     return tx.pmin(x, "data")
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 4}, out_specs=P())
      array([0.], dtype=float32)
    """
    return _reduce_to_extreme("pmin", x, axis, name, lax.pmin)


def _reduce_to_extreme(
    op: str, x: Any, axis: Any, name: str | None, extreme: Callable[..., Any]
) -> Any:
    axes = _leaves.check_axes(op, axis)

    def reduce_leaf(leaf: Leaf) -> jax.Array:
        if op == f"p{_compat.unreduced_kind(leaf.value)}":
            parts = _compat.unreduced_axes(leaf.value)
            if over := tuple(a for a in axes if a in parts):
                leaf = leaf._replace(value=extreme(leaf.value, over))
        kept = _leaves.differing_axes(op, leaf, axes)
        return extreme(leaf.value, kept) if kept else leaf.value

    return _leaves.map_leaves(op, x, reduce_leaf, name=name, verb="compare")
