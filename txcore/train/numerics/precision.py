"""Precision policies: the dtype in which a step computes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from txcore.train.numerics.loss_scale import LossScale, check_scale

POLICIES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclass(frozen=True)
class Precision:
    """Choose the dtype in which the model computes; parameters and gradients stay float32.

    Inside a step, `state.precision.cast(tree)` casts parameters and inputs. Cast inside the
    differentiated function, so that gradients come out, and are reduced, in float32.

    float16 rounds numbers below 6e-8 to zero, so its steps scale the loss, by
    `tx.value_and_grad(f, loss_scale=state.loss_scale)`; the same line works in every precision,
    where `state.loss_scale` is None. A step whose reduced gradients are not all finite changes
    only the loss scale: all else in the state stays, the step count included.

    Args:
      compute: "float32", "bfloat16" or "float16".
      loss_scale: of float16: a `tx.LossScale`, by default LossScale(); or a number above 0 for
        a scale that never changes. The other two have none.

    Raises:
      ValueError: an unknown policy, or a loss scale that does not go with it.

    Example:
      >>> tx.Precision("bfloat16").cast({"a": np.ones(2, np.float32), "label": np.ones(2, int)})
      {'a': Array([1, 1], dtype=bfloat16), 'label': array([1, 1])}

    References:
      Micikevicius et al., "Mixed precision training", 2018.
    """

    compute: str = "float32"
    loss_scale: LossScale | float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.compute, str) or self.compute not in POLICIES:
            names = ", ".join(map(repr, POLICIES))
            raise ValueError(f"precision needs to be one of {names}, got {self.compute!r}")
        if self.compute != "float16" and self.loss_scale is not None:
            raise ValueError(
                f"Precision({self.compute!r}) keeps no loss scale, since it has the exponents of "
                f"float32, got loss_scale={self.loss_scale!r}: leave it out"
            )
        if self.loss_scale is not None and not isinstance(self.loss_scale, LossScale):
            check_scale("Precision", "loss_scale", self.loss_scale)

    @property
    def scaling(self) -> LossScale | float | None:
        """How the loss scale changes; None without one."""
        if self.compute == "float16" and self.loss_scale is None:
            return LossScale()
        return self.loss_scale

    def cast(self, tree: Any) -> Any:
        """Cast the floating-point leaves of `tree` to the compute dtype."""
        dtype = POLICIES[self.compute]

        def one(leaf: Any) -> Any:
            return jnp.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(one, tree)
