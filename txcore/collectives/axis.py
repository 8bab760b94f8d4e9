"""axis_index and axis_size: where this device stands along an axis."""

import jax
import jax.numpy as jnp
from jax import lax

from txcore.collectives import _leaves
from txcore.collectives._calls import explain_calls
from txcore.step_scope import left_out_axes


@explain_calls
def axis_index(axis: str | tuple[str, ...]) -> jax.Array:
    """Return this device's index along `axis`.

    Args:
      axis: mesh axis name, or a tuple of names counted in row-major order.

    Returns:
      int32 scalar from 0 to `axis_size(axis) - 1`; it varies along `axis`.

    Raises:
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x):
      ...     return x + tx.axis_index("data")
      >>> tx.testing.run_sharded(f, np.zeros(4), axes={"data": 4})
      array([0., 1., 2., 3.], dtype=float32)
    """
    axes = _leaves.check_axes("axis_index", axis)
    kept = tuple(a for a in axes if a not in left_out_axes())
    return lax.axis_index(kept) if kept else jnp.int32(0)


@explain_calls
def axis_size(axis: str | tuple[str, ...]) -> int:
    """Return the number of devices along `axis`.

    Args:
      axis: mesh axis name, or a tuple of names whose sizes are multiplied.

    Returns:
      A Python int: it is known when the program is traced.

    Raises:
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x):
      ...     return x / tx.axis_size("data")
      >>> tx.testing.run_sharded(f, np.ones(4), axes={"data": 4})
      array([0.25, 0.25, 0.25, 0.25], dtype=float32)
    """
    return _leaves.axes_size(_leaves.check_axes("axis_size", axis))
