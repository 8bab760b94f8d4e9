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
    """Average values of examples, or of tokens, so that `pmean` gives the global batch's mean.

    Equation: `N * sum(values * mask * weights) / psum(sum(mask * weights))`, for N devices along
    `axis`: then `pmean` of it (and of its gradients) is the mean over all valid examples, however
    they are distributed. A plain local mean is wrong as soon as the last batch is padded, or
    sequences have different lengths.

    A batch in parts has one count for all of them, or the mean would be one of means. In the
    microbatches of `tx.value_and_grad(microbatches=)` it is taken before their loop. In a loop of
    your own take `count = tx.psum(jnp.sum(mask), axis)` of the whole batch before it, give it to
    each part, and add the parts up; they are not to be averaged.

    Args:
      values: one number for each example of this device, shape (batch,), or for each token,
        (batch, length); floating point.
      mask: 1 for real examples or tokens and 0 for padding; None if all are real. Of the shape of
        `values`, or of its first dims: a mask of shape (batch,) holds for all tokens of an example.
        Other numbers weigh. A NaN in the value of padding does not reach the mean, but one inside
        the model still reaches its gradient (0 * NaN): pad inputs with finite numbers.
      axis: the data axes.
      weights: by which they weigh, of a shape as `mask`; None if all weigh the same.
      count: the sum of the mask (times the weights, over all of `values`) of the whole global
        batch, the same on every device; None to sum up those given.

    Returns:
      A scalar of at least float32 that varies along `axis`. With a mask or weights, and without
      a count, it costs one psum of a scalar, tagged `psum/example_count`, for which the devices
      wait in the middle of a step. Where the host knows the count, as with an epoch's last batch,
      give it as `count`. An empty global batch gives 0.

    Raises:
      ValueError: `values` is a scalar, `mask` or `weights` has not its shape or first dims; in a
        step, without a count, also: `axis` leaves out a data axis, or a mask of a part of the
        batch; `count` differs between devices.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x, mask):
      ...     return tx.pmean(tx.example_mean(x, mask, axis="data"), "data")
      >>> x, mask = np.array([1.0, 2.0, 6.0, 99.0]), np.array([1.0, 1.0, 1.0, 0.0])
      >>> float(tx.testing.run_sharded(f, x, mask, axes={"data": 2}, out_specs=P()))
      3.0
      >>> tokens, mask = np.array([[1.0, 2.0], [6.0, 99.0]]), np.array([[1.0, 1.0], [1.0, 0.0]])
      >>> float(tx.testing.run_sharded(f, tokens, mask, axes={"data": 2}, out_specs=P()))
      3.0
    """
    factors = [_spread_over(values, f) for f in (mask, weights) if f is not None]
    if values.ndim == 0:
        raise ValueError(
            "tx.example_mean needs values of shape (batch,), or (batch, length), got a scalar: "
            "give one number for each example, and leave the mean to it"
        )
    axes = _leaves.check_axes("example_mean", axis)
    values = values.astype(_choose_wide_dtype(values.dtype))
    if not factors and count is None:
        return jnp.mean(values)
    _note_weights(mask, weights)
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


def _spread_over(values: jax.Array, factor: ArrayLike) -> jax.Array:
    """Return a mask or weights in the shape of `values`, of whose first dims they are."""
    factor = jnp.asarray(factor)
    if factor.ndim == 0 or factor.shape != values.shape[: factor.ndim]:
        raise ValueError(
            "tx.example_mean needs a mask (and weights) of the shape of values or of its first "
            f"dims, got {factor.shape} for values of shape {values.shape}: (batch,) for examples, "
            "(batch, length) for tokens"
        )
    inner = (1,) * (values.ndim - factor.ndim)
    return jnp.broadcast_to(factor.reshape(factor.shape + inner), values.shape)


def _note_weights(mask: ArrayLike | None, weights: ArrayLike | None) -> None:
    """Note in the step's scope what a mean weighs by: `engine.evaluate` has to weigh by it too."""
    scope = current_scope()
    if scope is None:
        return
    if weights is not None:
        scope.weighed.append("weights")
    elif mask is not None:
        is_of_examples = jnp.shape(mask) == (scope.examples,)
        scope.weighed.append("examples" if is_of_examples else "tokens")


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
    local = _sum_product(factors)
    if part is not None:
        return total_of(part, Asked(local, partial(_global_sum, axes=axes)))
    # Of as many rows it may still be a part: of the tokens of each example.
    if scope is not None and (rows != scope.examples or factors[0].ndim > 1):
        error = (
            "tx.example_mean ({source}) counts what is real in one part of the batch, inside "
            f"a loop over the parts: {remedy}"
        )
        local = varying.claim(local, "whole", axes, what="the count", error=error)
    return _global_sum(local, axes)


def _choose_wide_dtype(*dtypes: Any) -> Any:
    """Return float32, or float64 where one of the dtypes is; asks for no implicit promotion."""
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32


def _sum_product(factors: list[jax.Array]) -> jax.Array:
    """Return the sum of the factors' product: int32 where all are counts, else float32 or wider."""
    counts = all(not jnp.issubdtype(f.dtype, jnp.inexact) for f in factors)
    dtype = jnp.int32 if counts else _choose_wide_dtype(*(f.dtype for f in factors))
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
