"""Precision policies: in which dtype a step computes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

POLICIES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Precision:
    """Parameters, gradients and optimizer state stay float32; the model computes in `compute`.

    Inside a step, `state.precision.cast(tree)` casts parameters and inputs. Cast inside the
    differentiated function, so that gradients come out, and are reduced, in float32.

    Args:
      compute: "float32" or "bfloat16".

    Raises:
      ValueError: an unknown policy.

    Example:
      >>> tx.Precision("bfloat16").cast({"a": np.ones(2, np.float32), "label": np.ones(2, int)})
      {'a': Array([1, 1], dtype=bfloat16), 'label': array([1, 1])}
    """

    compute: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.compute, str) or self.compute not in POLICIES:
            names = ", ".join(map(repr, POLICIES))
            raise ValueError(f"precision must be one of {names}, got {self.compute!r}")

    def cast(self, tree: Any) -> Any:
        """Cast the floating-point leaves of `tree` to the compute dtype."""
        dtype = POLICIES[self.compute]

        def one(leaf: Any) -> Any:
            return jnp.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(one, tree)
