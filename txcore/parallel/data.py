"""The mean over the examples of the global batch."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from txcore import varying
from txcore.collectives import _leaves, axis_size, psum, vary
from txcore.parallel.microbatches import Asked, current_part, total_of
from txcore.step_scope import current_scope


def example_mean(
    values: jax.Array,
    mask: jax.Array | None = None,
    *,
    axis: str | tuple[str, ...],
    weights: jax.Array | None = None,
    count: ArrayLike | None = None,
) -> jax.Array:
    """Average per-example values so that `pmean` gives the mean over the global batch.

    Equation: `N * sum(values * mask * weights) / psum(sum(mask * weights))`, for N devices along
    `axis`: then `pmean` of it (and of its gradients) is the mean over all valid examples, however
    they are distributed. A plain local mean is wrong as soon as the last batch is padded.

    A batch in parts has one count for all of them, or the mean would be one of means. In the
    microbatches of `tx.value_and_grad(microbatches=)` it is taken before their loop. In a loop of
    your own take `count = tx.psum(jnp.sum(mask), axis)` of the whole batch before it, give it to
    each part, and add the parts up; they are not to be averaged.

    Args:
      values: shape (batch,), one number for each example of this device; floating point.
      mask: shape (batch,), 1 for real examples and 0 for padding; None if all are real. Other
        numbers weigh. A NaN in the value of padding does not reach the mean, but one inside the
        model still reaches its gradient (0 * NaN): pad inputs with finite numbers.
      axis: the data axes.
      weights: shape (batch,), by which the examples weigh; None if all weigh the same.
      count: the sum of the mask (times the weights) over the whole global batch, the same on
        every device; None to sum up those given.

    Returns:
      A scalar of at least float32 that varies along `axis`. With a mask or weights, and without
      a count, it costs one psum of a scalar, tagged `psum/example_count`, for which the devices
      wait in the middle of a step. Where the host knows the count, as with an epoch's last batch,
      give it as `count`. An empty global batch gives 0.

    Raises:
      ValueError: `values`, `mask` or `weights` is not of shape (batch,), or they differ; in a
        step, without a count, also: `axis` leaves out a data axis, or a mask of a part of the
        batch; `count` differs between devices.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x, mask):
      ...     return tx.pmean(tx.example_mean(x, mask, axis="data"), "data")
      >>> x, mask = np.array([1.0, 2.0, 6.0, 99.0]), np.array([1.0, 1.0, 1.0, 0.0])
      >>> float(tx.testing.run_sharded(f, x, mask, axes={"data": 2}, out_specs=P()))
      3.0
    """
    factors = [jnp.asarray(f) for f in (mask, weights) if f is not None]
    shapes = [f.shape for f in factors]
    if values.ndim != 1 or any(shape != values.shape for shape in shapes):
        given = (values.shape, *shapes) if shapes else values.shape
        raise ValueError(
            "tx.example_mean needs values (and mask, and weights) of shape (batch,), got "
            f"{given}: reduce each example to one number first"
        )
    axes = _leaves.check_axes("example_mean", axis)
    values = values.astype(_wide(values.dtype))
    if not factors and count is None:
        return jnp.mean(values)
    for factor in factors:
        # where too: 0 * NaN is NaN.
        kept = jnp.where(factor.astype(jnp.bool_), values, jnp.zeros_like(values))
        values = kept if factor.dtype == jnp.bool_ else kept * factor.astype(values.dtype)
    if count is None:
        total = _count_of_batch(factors, axes)
    else:
        total = _same_everywhere(jnp.asarray(count), axes)
    # The scope's name tells whoever reads the traced program where N stands in the mean.
    with jax.named_scope("example_mean"):
        total = total.astype(values.dtype)
        none = total == jnp.zeros_like(total)
        mean = axis_size(axes) * jnp.sum(values) / jnp.where(none, jnp.ones_like(total), total)
        mean = jnp.where(none, jnp.zeros_like(mean), mean)
    part = current_part()
    return mean if part is None else mean * part.number  # then the mean over the parts is right


def _count_of_batch(factors: list[jax.Array], axes: tuple[str, ...]) -> jax.Array:
    """Sum mask and weights over the global batch; refuse to where it is not known to be whole."""
    scope, part, rows = current_scope(), current_part(), factors[0].shape[0]
    left_out = [a for a in scope.data_axes if a not in axes] if scope is not None else []
    if scope is not None and left_out:
        raise ValueError(
            f"tx.example_mean needs all axes that the batch is sharded over, got axis="
            f"{_leaves.names_of(axes)} and not {_leaves.names_of(left_out)}: the real examples of "
            "the other devices would not be counted. Write "
            f"axis={_leaves.names_of(scope.data_axes)}"
        )
    remedy = (
        "a mean of means, since its parts have different numbers of real ones. Take count = "
        f"tx.psum(jnp.sum(mask), {_leaves.names_of(axes)}) of the whole batch's mask before it is "
        "split, pass tx.example_mean(..., count=count), and add the results up"
    )
    examples = part.examples if part is not None else scope.examples if scope is not None else 0
    if rows < examples:
        raise ValueError(
            f"tx.example_mean needs the mask of the whole batch, {examples} examples on this "
            f"device, got {rows}: the mean over a part of it is {remedy}"
        )
    local = _sum(factors)
    if part is not None:
        return total_of(part, Asked(local, partial(_global_sum, axes=axes)))
    if scope is not None and rows != scope.examples:
        error = (
            "tx.example_mean ({source}) counts the real examples of one part of the batch, inside "
            f"a loop over the parts: {remedy}"
        )
        local = varying.claim(local, "whole", axes, what="the count", error=error)
    return _global_sum(local, axes)


def _wide(*dtypes: Any) -> Any:
    """Return float32, or float64 where one of the dtypes is; asks for no implicit promotion."""
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32


def _sum(factors: list[jax.Array]) -> jax.Array:
    """Return the sum of the factors' product: int32 where all are counts, else float32 or wider."""
    counts = all(not jnp.issubdtype(f.dtype, jnp.inexact) for f in factors)
    dtype = jnp.int32 if counts else _wide(*(f.dtype for f in factors))
    return jnp.sum(
        math.prod((f.astype(dtype) for f in factors[1:]), start=factors[0].astype(dtype))
    )


def _same_everywhere(count: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    error = (
        "tx.example_mean needs count= the number of the whole global batch, but what it is given "
        "varies along axis {axis}{source}: it is the number of one device. Write count = "
        "tx.psum(count, {axis})"
    )
    if current_scope() is not None:
        error = error.replace("{source}", " ({source})")
        return varying.claim(count, "equal", axes, what="count", error=error)
    if local := [a for a in axes if _leaves.varies_along(count, a)]:
        raise ValueError(error.replace("{source}", "").replace("{axis}", _leaves.names_of(local)))
    return count


def global_count(mask: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Count the real examples of the global batch (int32 scalar, invariant along `axes`)."""
    return _global_sum(jnp.sum(mask.astype(jnp.bool_), dtype=jnp.int32), axes)


def _global_sum(local: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    # A mask that is the same on every device still counts once for each device's examples.
    larger = tuple(a for a in axes if axis_size(a) > 1)
    if larger:
        local = vary(local, larger, name="example_count")
    return psum(local, axes, name="example_count")
