"""Learning rates that follow the step."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from txcore.kernels.common.checks import whole_number

Schedule = Callable[[ArrayLike], ArrayLike]


def constant(value: float) -> Schedule:
    """Make a schedule that returns the same rate at every step.

    Args:
      value: at least 0.

    Returns:
      A function: step (int32 scalar, completed updates) -> float32 scalar.

    Raises:
      ValueError: `value` is not a finite number of at least 0.

    Example:
      >>> import txcore as tx
      >>> float(tx.optim.constant(0.5)(7))
      0.5
    """
    value = _check_rate("constant", "value", value)
    return lambda step: jnp.asarray(value, jnp.float32)


def warmup(schedule: float | Schedule, warmup_steps: int) -> Schedule:
    """Make a schedule that rises linearly to another one over its first steps.

    The factor of update number t (from 1) is min(1, t / warmup_steps), so that no update is
    lost on a rate of 0.

    Args:
      schedule: what to scale: at least 0, or a schedule.
      warmup_steps: updates until the full rate, at least 0.

    Returns:
      A function: step (int32 scalar, completed updates) -> float32 scalar.

    Raises:
      TypeError: `schedule` is neither a number nor a schedule.
      ValueError: a number is out of its range.

    Example:
      >>> import txcore as tx
      >>> schedule = tx.optim.warmup(0.5, warmup_steps=4)
      >>> [float(schedule(step)) for step in range(6)]
      [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]

    References:
      Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017, 2.2.
    """
    rate = as_schedule("warmup", "schedule", schedule)
    warmup_steps = _check_count("warmup", "warmup_steps", warmup_steps, 0)

    def scaled(step: ArrayLike) -> jax.Array:
        done = jnp.asarray(step, jnp.float32) + 1
        factor = jnp.minimum(1, done / max(warmup_steps, 1))
        return jnp.asarray(rate(step), jnp.float32) * factor

    return scaled


def cosine(peak: float, total_steps: int, warmup_steps: int = 0, end: float = 0.0) -> Schedule:
    """Make a schedule that falls from `peak` to `end` along half a cosine, after a warm-up.

    Args:
      peak: the rate after the warm-up, at least 0.
      total_steps: updates until `end`, warm-up included; the rate stays `end` from there on.
      warmup_steps: updates of linear warm-up (see `warmup`), at least 0, below `total_steps`.
      end: the last rate, at least 0.

    Returns:
      A function: step (int32 scalar, completed updates) -> float32 scalar.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> import txcore as tx
      >>> schedule = tx.optim.cosine(1.0, total_steps=4)
      >>> [round(float(schedule(step)), 3) for step in range(6)]
      [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]

    References:
      Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017.
    """
    peak, end = _check_rate("cosine", "peak", peak), _check_rate("cosine", "end", end)
    warmup_steps = _check_count("cosine", "warmup_steps", warmup_steps, 0)
    total_steps = _check_count("cosine", "total_steps", total_steps, warmup_steps + 1)

    def fall(step: ArrayLike) -> jax.Array:
        done = (jnp.asarray(step, jnp.float32) - warmup_steps) / (total_steps - warmup_steps)
        height = (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1))) / 2
        return end + (peak - end) * height

    return warmup(fall, warmup_steps)


def linear_scaling(base: float, batch_size: int, base_batch_size: int) -> float:
    """Scale a learning rate in proportion to the global batch.

    Args:
      base: the rate tuned for `base_batch_size`, at least 0.
      batch_size: examples in a global batch, at least 1.
      base_batch_size: examples in a global batch, at least 1.

    Returns:
      base * batch_size / base_batch_size.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> import txcore as tx
      >>> tx.optim.linear_scaling(0.1, batch_size=1024, base_batch_size=256)
      0.4

    References:
      Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017, 2.1.
    """
    base = _check_rate("linear_scaling", "base", base)
    batch_size = _check_count("linear_scaling", "batch_size", batch_size, 1)
    base_batch_size = _check_count("linear_scaling", "base_batch_size", base_batch_size, 1)
    return base * batch_size / base_batch_size


def as_schedule(op: str, option: str, rate: float | Schedule) -> Schedule:
    """Return a function of the step for a number or a schedule, or refuse it.

    A number stays a Python number, so that float64 parameters get all its digits.
    """
    if not callable(rate):
        number = _read_number(rate)
        if number is None:
            raise TypeError(
                f"{op}: {option} needs a number or a schedule (step -> float32 scalar), "
                f"got {type(rate).__name__}: pass a float, or a function such as "
                "tx.optim.cosine(...)"
            )
        value = _check_rate(op, option, number)
        return lambda step: value

    def scalar(step: ArrayLike) -> ArrayLike:
        value = rate(step)
        if jnp.shape(value) != ():
            raise ValueError(
                f"{op}: {option}(step) needs to be a scalar, got shape {jnp.shape(value)}: "
                "return one number for the step that is passed"
            )
        return value

    return scalar


def _read_number(value: Any) -> float | None:
    """Return a number (Python's, NumPy's, an array without dims) as a float, else None."""
    if not isinstance(value, Real) and not (hasattr(value, "dtype") and np.ndim(value) == 0):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _check_rate(op: str, option: str, value: Any) -> float:
    number = _read_number(value)
    if number is None or not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{op}: {option} needs a finite number of at least 0, got {value!r}")
    return number


def _check_count(op: str, option: str, value: Any, least: int) -> int:
    number = whole_number(value)
    if number is None or number < least:
        raise ValueError(f"{op}: {option} needs an int of at least {least}, got {value!r}")
    return number
