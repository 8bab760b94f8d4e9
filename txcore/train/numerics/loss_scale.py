"""Dynamic loss scaling: the scale grows while gradients are finite, and shrinks when they are not.

The loss is multiplied by the scale, so that gradients that float16 would round to zero are
representable in the backward pass; `tx.value_and_grad` divides them by it again in float32.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from txcore.collectives import pmin, vary
from txcore.kernels.common.checks import whole_number

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class LossScale:
    """Configure how the loss scale of a float16 run changes (`Precision(loss_scale=)`).

    A step whose gradients are not all finite multiplies the scale by `backoff_factor`; after
    `growth_interval` finite steps in a row it is multiplied by `growth_factor`, unless the product
    exceeds float32. Powers of two change no digit of a gradient.

    Args:
      initial: the first scale, at least `minimum`.
      growth_interval: steps in a row, at least 1.
      growth_factor: above 1.
      backoff_factor: above 0 and below 1.
      minimum: the least scale, above 0.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> precision = tx.Precision("float16", loss_scale=tx.LossScale(growth_interval=500))
      >>> precision.loss_scale.initial
      65536.0

    References:
      Micikevicius et al., "Mixed precision training", 2018, section 3.2. The defaults are
      those of PyTorch's GradScaler.
    """

    initial: float = 2.0**16
    growth_interval: int = 2000
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    minimum: float = 1.0

    def __post_init__(self) -> None:
        check_scale("LossScale", "minimum", self.minimum)
        check_scale("LossScale", "initial", self.initial)
        if self.initial < self.minimum:
            raise ValueError(
                f"LossScale needs initial= at least minimum={self.minimum}, got {self.initial}"
            )
        interval = whole_number(self.growth_interval)
        if interval is None or interval < 1:
            raise ValueError(
                f"LossScale needs growth_interval= steps from 1 on, got {self.growth_interval!r}"
            )
        check_scale("LossScale", "growth_factor", self.growth_factor)
        if self.growth_factor <= 1:
            raise ValueError(f"LossScale needs growth_factor= above 1, got {self.growth_factor}")
        check_scale("LossScale", "backoff_factor", self.backoff_factor)
        if self.backoff_factor >= 1:
            raise ValueError(
                f"LossScale needs backoff_factor= below 1, got {self.backoff_factor}: for a scale "
                "that does not change, pass Precision('float16', loss_scale=1024.0)"
            )


class LossScaling(NamedTuple):
    """Hold the four scalars of the train state that belong to loss scaling.

    Attributes:
      scale: float32, the factor of the next step's loss.
      good_steps: int32, finite steps in a row since the scale last changed.
      skipped_steps: int32, steps so far that overflowed and changed nothing.
      culprit: int32, the first parameter whose gradient was not finite in the last skipped step,
        by its index among the leaves; -1 if no step was skipped.
    """

    scale: jax.Array
    good_steps: jax.Array
    skipped_steps: jax.Array
    culprit: jax.Array


def check_scale(op: str, option: str, value: Any) -> None:
    """Refuse a scale that is not a number above 0, or that float32 does not hold exactly."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not _SMALLEST <= value <= _LARGEST:
        raise ValueError(f"{op} needs {option}= a finite number above 0, got {value!r}")


def start(policy: LossScale | float | None) -> LossScaling | None:
    """Return the loss scaling of a run that has made no step yet."""
    if policy is None:
        return None
    initial = policy.initial if isinstance(policy, LossScale) else policy
    return LossScaling(jnp.float32(initial), jnp.int32(0), jnp.int32(0), jnp.int32(-1))


def advance(policy: LossScale | float, scaling: LossScaling, culprit: jax.Array) -> LossScaling:
    """Return the loss scaling after a step.

    Args:
      policy: how the scale changes; a number is a scale that never changes.
      scaling: the loss scaling during the step.
      culprit: int32 scalar, what `first_nonfinite` returned for the step's gradients.

    Returns:
      The loss scaling of the next step.
    """
    finite = culprit < 0
    culprit = jnp.where(finite, scaling.culprit, culprit)
    skipped = scaling.skipped_steps + jnp.where(finite, 0, 1)
    good = jnp.where(finite, scaling.good_steps + 1, 0)
    if not isinstance(policy, LossScale):
        return LossScaling(scaling.scale, good, skipped, culprit)
    grown = scaling.scale * jnp.float32(policy.growth_factor)
    due = good >= policy.growth_interval
    up = jnp.where(due & jnp.isfinite(grown), grown, scaling.scale)
    down = jnp.maximum(scaling.scale * jnp.float32(policy.backoff_factor), policy.minimum)
    return LossScaling(jnp.where(finite, up, down), jnp.where(due, 0, good), skipped, culprit)


def first_nonfinite(tree: Any, axes: tuple[str, ...] = ()) -> jax.Array:
    """Return the index of the first leaf with an inf or nan (int32 scalar); -1 if there is none.

    Args:
      tree: pytree of arrays.
      axes: the mesh axes over which leaves are split; one pmin over them makes the devices agree.
    """
    flags = [~jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    found = [jnp.where(flag, jnp.int32(i), jnp.int32(len(flags))) for i, flag in enumerate(flags)]
    first = functools.reduce(jnp.minimum, found, jnp.int32(len(flags)))
    if axes:
        first = pmin(vary(first, axes), axes, name="first_nonfinite")
    return jnp.where(first == len(flags), jnp.int32(-1), first)


def select(flag: jax.Array, then: Any, otherwise: Any) -> Any:
    """Return the tree `then` where `flag` is true, else `otherwise`."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        return a if a is b else jnp.where(flag, a, b)

    return jax.tree.map(one, then, otherwise)
