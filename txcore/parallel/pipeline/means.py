"""The mean over the examples of the batch, added up over microbatches."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from txcore.collectives import _leaves, axis_size, psum, vary
from txcore.kernels.common.checks import accumulator
from txcore.step_scope import current_scope


@dataclass(frozen=True)
class Means:
    """State how the values of a microbatch's examples become its part of the batch's mean.

    The parts of all microbatches add up to what `pmean` over the data axes makes the mean over the
    global batch. It has one count, whatever its microbatches.

    Attributes:
      op: what errors call the operation.
      data_axes: the axes that the batch is sharded over.
      microbatches: how many there are.
      examples: of each, on this device.
      count: the sum of the global batch's mask; None without a mask.
    """

    op: str
    data_axes: tuple[str, ...]
    microbatches: int
    examples: int
    count: Any

    def take_losses(self, losses: Any, mask: Any) -> jax.Array:
        """Return a microbatch's part of the loss; refuse what is no loss for each example."""
        dtype = getattr(losses, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"tx.{self.op} needs last to return a floating-point array of losses, one for each "
                f"example, got {type(losses).__name__ if dtype is None else dtype} (with "
                "has_aux=True, a pair of them and a pytree of such arrays)"
            )
        for axis in self.data_axes:
            if _leaves.varies_along(losses, axis) is False:
                raise ValueError(
                    f"tx.{self.op} needs last to return the losses of this device's examples, but "
                    f"they do not vary along data axis {axis!r}: they are reduced already, and "
                    f"tx.pmean of the gradients would give 1/{axis_size(axis)} of the truth. "
                    "Return the local ones"
                )
        return self._take("losses", losses, mask)

    def take_aux(self, aux: Any, mask: Any) -> Any:
        """Return a microbatch's part of the means of a pytree of values beside the losses."""
        return jax.tree.map(lambda leaf: self._take("aux", jnp.asarray(leaf), mask), aux)

    def _take(self, what: str, values: jax.Array, mask: Any) -> jax.Array:
        dims = () if mask is None else mask.shape
        if values.shape[:1] != (self.examples,) or values.shape[: len(dims)] != dims:
            needed = f"({self.examples}, ...)"
            if mask is not None:
                needed = f"{dims}, as the mask, or with more dims behind"
            raise ValueError(
                f"tx.{self.op} needs last to return {what} of shape {needed}, one number for each "
                f"example of the microbatch, got {values.shape}: the mean over the batch is taken "
                "here"
            )
        floating = jnp.issubdtype(values.dtype, jnp.floating)
        values = values.astype(accumulator(values.dtype) if floating else jnp.float32)
        if mask is None:
            return jnp.mean(values) / self.microbatches
        inner = values.shape[mask.ndim :]
        spread = mask.reshape(mask.shape + (1,) * len(inner))
        # Not a product alone: 0 * NaN is NaN.
        kept = jnp.where(spread != 0, values, jnp.zeros_like(values))
        if jnp.issubdtype(mask.dtype, jnp.inexact):
            kept = kept * spread.astype(values.dtype)
        # The scope's name tells whoever reads the traced program where N stands in the mean.
        with jax.named_scope("example_mean"):
            total = self.count.astype(values.dtype) * math.prod(inner)
            devices = math.prod(axis_size(axis) for axis in self.data_axes)
            none = total == jnp.zeros_like(total)
            mean = devices * jnp.sum(kept) / jnp.where(none, jnp.ones_like(total), total)
            return jnp.where(none, jnp.zeros_like(mean), mean)


def sum_mask(mask: Any, data_axes: tuple[str, ...]) -> Any:
    """Sum a mask over the global batch; None without one."""
    if mask is None:
        return None
    if (scope := current_scope()) is not None:  # an evaluation has to weigh its batches by it too
        is_of_examples = jnp.size(mask) == scope.examples  # maybe in microbatches
        scope.weighed.append("examples" if is_of_examples else "tokens")
    if jnp.issubdtype(mask.dtype, jnp.inexact):
        count = jnp.sum(mask.astype(accumulator(mask.dtype)))
    else:
        count = jnp.sum(mask, dtype=jnp.int32)
    if not data_axes:
        return count
    # A mask that is the same on every device still counts once for each device's examples.
    return psum(vary(count, data_axes, name="example_count"), data_axes, name="example_count")
