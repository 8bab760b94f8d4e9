"""all_to_all: every device sends one slice to every other device."""

from typing import Any

import jax
from jax import lax

from txcore.collectives import _leaves
from txcore.collectives._calls import explain_calls
from txcore.collectives._leaves import Leaf


@explain_calls
def all_to_all(
    x: Any,
    axis: str | tuple[str, ...],
    *,
    split_dim: int,
    concat_dim: int,
    name: str | None = None,
) -> Any:
    """Send the i-th slice of `split_dim` to device i; concatenate what arrives in `concat_dim`.

    Equation: `y[i] = concatenate([split(x[j], n, split_dim)[i] for j in range(n)], concat_dim)`:
    a sharded `concat_dim` becomes whole while a whole `split_dim` becomes sharded.

    Transpose: `all_to_all` with `split_dim` and `concat_dim` exchanged.

    Args:
      x: pytree of arrays; `split_dim` divisible by the axis size.
      axis: mesh axis name, or a tuple of names, in row-major order.
      split_dim: the array dim to split.
      concat_dim: the array dim to concatenate along; may equal `split_dim`.
      name: label of the operation's tag; letters, digits and `_ . / -`.

    Returns:
      Arrays with `split_dim` shorter and `concat_dim` longer by the axis size.

    Raises:
      ValueError: a leaf lacks a dim, or `split_dim` is indivisible.
      TypeError: a leaf is no array.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x):
      ...     return tx.all_to_all(x, "data", split_dim=1, concat_dim=0)
      >>> x = np.array([[0.0, 1.0], [2.0, 3.0]])  # sharded by rows; becomes sharded by columns
      >>> tx.testing.run_sharded(f, x, axes={"data": 2}, out_specs=P(None, "data"))
      array([[0., 1.],
             [2., 3.]], dtype=float32)
    """
    axes = _leaves.check_axes("all_to_all", axis)

    def exchange_leaf(leaf: Leaf) -> jax.Array:
        split = _leaves.check_dim("all_to_all", "split_dim", split_dim, leaf)
        concat = _leaves.check_dim("all_to_all", "concat_dim", concat_dim, leaf)
        _leaves.check_divisible("all_to_all", "split_dim", split, leaf, axes)
        value, kept = _leaves.moved_axes("all_to_all", leaf, axes)
        return lax.all_to_all(value, kept, split, concat, tiled=True) if kept else value

    return _leaves.map_leaves("all_to_all", x, exchange_leaf, name=name, verb="exchange")
