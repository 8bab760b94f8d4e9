"""Data parallelism: the mean over the global batch, and the reduction of gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from txcore.collectives import _leaves, axis_size, pmean, psum


def example_mean(
    values: jax.Array, mask: jax.Array | None = None, *, axis: str | tuple[str, ...]
) -> jax.Array:
    """Average per-example values so that `pmean` gives the mean over the global batch.

    Equation: `N * sum(values * mask) / psum(sum(mask))`, for N devices along `axis`: then
    `pmean` of it (and of its gradients) is the mean over all valid examples, however they
    are distributed. A plain local mean is wrong as soon as the last batch is padded.

    Args:
      values: shape (batch,), one number for each example of this device; floating point.
      mask: shape (batch,), 1 for real examples and 0 for padding; None if all are real.
        A NaN in the value of padding does not reach the mean, but one inside the model still
        reaches its gradient (0 * NaN): pad inputs with finite numbers.
      axis: the data axes.

    Returns:
      A scalar of at least float32 that varies along `axis`. With a mask it costs one psum of
      a scalar, tagged `psum/example_count`, for which the devices wait in the middle of a step.
      Where the host knows the count, as with an epoch's last batch, leave the mask out and
      multiply `values` by the weights (global batch / count), 0 for padding. An empty global
      batch gives 0.

    Raises:
      ValueError: `values` or `mask` is not of shape (batch,), or they differ.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x, mask):
      ...     return tx.pmean(tx.example_mean(x, mask, axis="data"), "data")
      >>> x, mask = np.array([1.0, 2.0, 6.0, 99.0]), np.array([1.0, 1.0, 1.0, 0.0])
      >>> float(tx.testing.run_sharded(f, x, mask, axes={"data": 2}, out_specs=P()))
      3.0
    """
    if values.ndim != 1 or (mask is not None and mask.shape != values.shape):
        given = values.shape if mask is None else (values.shape, mask.shape)
        raise ValueError(
            f"tx.example_mean needs values (and mask) of shape (batch,), got {given}: reduce each "
            "example to one number first"
        )
    axes = _leaves.check_axes("example_mean", axis)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if mask is None:
        return jnp.mean(values)
    # where, not a product: 0 * NaN is NaN.
    local = jnp.sum(jnp.where(mask != 0, values, jnp.zeros_like(values)))
    count = global_count(mask, axes).astype(values.dtype)
    return axis_size(axes) * local / jnp.maximum(count, 1)


def global_count(mask: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Count the real examples of the global batch (int32 scalar, invariant along `axes`)."""
    local = jnp.sum(mask != 0, dtype=jnp.int32)
    # A mask that is the same on every device still counts once for each device's examples.
    local = _leaves.vary_leaf(local, tuple(a for a in axes if axis_size(a) > 1))
    return psum(local, axes, name="example_count")


def sync_gradients(
    grads: Any, axis: str | tuple[str, ...], *, comm_state: None = None, name: str = "grads"
) -> tuple[Any, None]:
    """Average gradients over the data axes: one all-reduce for each leaf, which XLA combines.

    Equation: `pmean(grads, axis)`.

    Args:
      grads: pytree of gradients, local to each device.
      axis: the data axes.
      comm_state: state of the compression; this plain mean has none.
      name: label of the operations' tags.

    Returns:
      The averaged gradients and the new `comm_state`.

    Raises:
      ValueError, TypeError, NameError: as `pmean`.

    Example:
      >>> def f(g):
      ...     return tx.sync_gradients({"w": g}, "data")[0]["w"]
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 4}, out_specs=P())
      array([1.5], dtype=float32)
    """
    return pmean(grads, axis, name=name), comm_state
