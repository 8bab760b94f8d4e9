"""Mean and variance over the whole batch: what batch normalisation needs on several devices."""

import math

import jax
import jax.numpy as jnp

from txcore.collectives import _leaves
from txcore.collectives.psum import psum
from txcore.kernels.common.checks import accumulator

Dims = int | tuple[int, ...]


def batch_moments(
    x: jax.Array,
    axis: str | tuple[str, ...],
    *,
    mask: jax.Array | None = None,
    dims: Dims | None = None,
    shift: jax.Array | float = 0.0,
    name: str = "batch_moments",
) -> tuple[jax.Array, jax.Array]:
    """Compute the mean and the variance of `x` over the examples of all devices, in one psum.

    Equation: `mean = psum(sum(x)) / n`, `var = psum(sum((x - mean)^2)) / n`, with n the number of
    all that is averaged (the variance of the batch itself, which normalises it; multiply by
    n / (n - 1) for that of the population).

    Numerics: each device takes its own mean first and then squares what deviates from it, in
    float32 or wider whatever the dtype of `x`; the devices' moments are merged as Chan, Golub and
    LeVeque do, relative to `shift`. Nothing cancels within a device. Between devices the
    variance has an error of about 1e-7 (mean - shift)^2: pass the running mean as `shift`
    where means are a hundred times the deviation.

    Transpose: the gradient flows through both results to the examples of all devices. They are
    invariant along `axis`: store them as they are. Where they meet the batch jax casts them by
    itself, and leaves the psum of the backward pass without a tag (an audit is `ok`, not
    `exact`); `tx.vary((mean, var), axis)` before tags it.

    Args:
      x: floating-point array of this device's examples, (batch, ..., features).
      axis: the data axes; along those of size 1 there is nothing to send.
      mask: shape `x.shape[:k]` for some k, all of them averaged over: 1 for what is real and 0 for
        padding, (batch,) or (batch, time). What is masked has no part in the results, nor a
        gradient, NaN or not.
      dims: the array dims to average over; by default all but the last. With channels first, as
        in equinox and PyTorch: (0, 2, 3).
      shift: a number near the mean that is the same on every device, broadcastable to the
        result; changes nothing but the rounding, and takes no gradient.
      name: label of the operation's tag.

    Returns:
      The mean and the variance, of the shape of `x` without `dims`; float32 or wider. Both are 0
      where nothing is real.

    Raises:
      TypeError: `x` is not floating-point.
      ValueError: `dims` or `mask` does not fit, or `x` is the same on all devices.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x):
      ...     return tx.batch_moments(x, "data")
      >>> x = np.array([[1.0, 10.0], [3.0, 10.0], [5.0, 10.0], [7.0, 10.0]], np.float32)
      >>> tx.testing.run_sharded(f, x, axes={"data": 2}, out_specs=P())
      (array([ 4., 10.], dtype=float32), array([5., 0.], dtype=float32))

    References:
      Ioffe and Szegedy, "Batch normalization", 2015; Chan, Golub, LeVeque, "Algorithms for
      computing the sample variance", 1983, equations 2.1 and 3.
    """
    axes = _leaves.check_axes("batch_moments", axis)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"tx.batch_moments needs floating-point x, got {x.dtype}: cast it first")
    over = _check_dims(dims, x.ndim)
    kept = _leaves.reduced_axes("batch_moments", _leaves.Leaf(x, "x"), axes, mean=True)
    x = x.astype(accumulator(x.dtype))
    real = None if mask is None else _find_real(mask, x, over)
    mean, within, count = _compute_local(x, real, over)
    if not kept:
        return mean, within / jnp.maximum(count, 1)
    shift = jax.lax.stop_gradient(jnp.asarray(shift, x.dtype))
    return _merge_moments(mean, within, count, shift, kept, name)


def _check_dims(dims: Dims | None, ndim: int) -> tuple[int, ...]:
    """Return the dims to average over, counted from the front, in order."""
    given = tuple(range(ndim - 1)) if dims is None else dims
    given = (given,) if isinstance(given, int) else tuple(given)
    found = {d % ndim for d in given if -ndim <= d < ndim}
    if not found or len(found) != len(given):
        raise ValueError(
            f"tx.batch_moments needs dims= some dims of x to average over, each once, got {dims} "
            f"for an x of {ndim} dims"
        )
    return tuple(sorted(found))


def _find_real(mask: jax.Array, x: jax.Array, over: tuple[int, ...]) -> jax.Array:
    """Return which elements of `x` are real, with dims of size 1 for those that mask lacks."""
    k = jnp.ndim(mask)
    if jnp.shape(mask) != x.shape[:k] or not set(range(k)) <= set(over):
        raise ValueError(
            f"tx.batch_moments needs mask= of x's first dims, all of them among dims {over}: "
            f"got shape {jnp.shape(mask)} for an x of shape {x.shape}"
        )
    return jnp.reshape(jnp.asarray(mask) != 0, x.shape[:k] + (1,) * (x.ndim - k))


def _compute_local(
    x: jax.Array, real: jax.Array | None, over: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return this device's mean, its sum of squared deviations, and of how many they are."""
    count = jnp.asarray(math.prod(x.shape[d] for d in over), x.dtype)
    if real is not None:
        x = jnp.where(real, x, 0)  # not a product: 0 * NaN is NaN
        count = count * jnp.mean(real, dtype=x.dtype)
    mean = jnp.sum(x, over) / jnp.maximum(count, 1)
    deviation = x - jnp.expand_dims(mean, over)
    if real is not None:
        deviation = jnp.where(real, deviation, 0)
    return mean, jnp.sum(deviation**2, over), count


def _merge_moments(
    mean: jax.Array,
    squares: jax.Array,
    count: jax.Array,
    shift: jax.Array,
    axes: tuple[str, ...],
    name: str,
) -> tuple[jax.Array, jax.Array]:
    """Merge the devices' moments, in one psum of one vector."""
    away = mean - shift
    parts = (count * away, squares + count * away**2, count)
    sizes = (away.size, 2 * away.size)
    sent = jnp.concatenate([jnp.ravel(part) for part in parts])
    first, second, total = jnp.split(psum(sent, axes, name=name), sizes)
    total = jnp.maximum(total[0], 1)
    first, second = (part.reshape(away.shape) / total for part in (first, second))
    return shift + first, jnp.maximum(second - first**2, 0)
