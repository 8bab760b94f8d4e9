"""The fused linear layer and loss in XLA's own ops, by blocks of classes."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from txcore.kernels.common import checks
from txcore.kernels.cross_entropy import online, xla
from txcore.kernels.cross_entropy.blocks import ClassBlocks, Cut
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem

Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
Residuals = tuple[Operands, online.Normalizer, jax.Array | None]


def list_configs(problem: Problem) -> list[ClassBlocks]:
    """Return the block sizes worth trying, the best guess first."""
    x, w, *_ = problem.shapes
    if problem.platform == "gpu":
        return [ClassBlocks(min(size, w[1])) for size in (8192, 4096, 16384, 1024, w[1])]
    return [ClassBlocks(size) for size in xla.block_sizes(math.prod(x[:-1]), w[1])]


def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    labels: jax.Array,
    *,
    config: ClassBlocks,
    label_smoothing: float,
) -> jax.Array:
    """Compute the op of `txcore.kernels.linear_cross_entropy` on checked operands."""
    rows, indices = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    factors = factor_dtype(x.dtype)
    losses = _linear_cross_entropy(rows, w, b, indices, factors, config.classes, label_smoothing)
    return losses.reshape(labels.shape)


def factor_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype in which operands of `dtype` enter a matrix product."""
    # Few CPUs multiply half-precision numbers. XLA widens them inside its product, which is far
    # slower than a cast before it.
    return checks.accumulator(dtype) if registry.current_device()[0] == "cpu" else dtype


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    labels: jax.Array,
    factors: jnp.dtype,
    block: int,
    smoothing: float,
) -> jax.Array:
    return _forward(x, w, b, labels, factors, block, smoothing)[0]


def _forward(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    labels: jax.Array,
    factors: jnp.dtype,
    block: int,
    smoothing: float,
) -> tuple[jax.Array, Residuals]:
    cut = Cut.into_even_blocks(w.shape[1], block)
    whole = compute_logits(x, w, b, factors) if cut.count == 1 else None

    def stats_of(index: jax.Array | int) -> online.Stats:
        scores = _scores_of_block(x, w, b, factors, cut, index) if whole is None else whole
        chosen = online.is_label(labels, cut.start_of(index), cut.size)
        return online.block_stats(scores, chosen, cut.is_fresh(index), smoothing)

    known = online.combine_stats(xla.over_blocks(stats_of, cut), cut.fresh)
    loss, normalizer = online.compute_losses(known, labels, cut.length, smoothing)
    return loss, ((x, w, b, labels), normalizer, whole)


def _backward(
    factors: jnp.dtype, block: int, smoothing: float, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    operands, normalizer, whole = residuals
    x, w, b, labels = operands
    cut = Cut.into_even_blocks(w.shape[1], block)

    def gradient_of(index: jax.Array | int) -> jax.Array:
        scores = _scores_of_block(x, w, b, factors, cut, index) if whole is None else whole
        chosen = online.is_label(labels, cut.start_of(index), cut.size)
        return online.block_gradient(scores, chosen, normalizer, g, cut.length, smoothing)

    return (*compute_gradients(gradient_of, x, w, b, factors, cut), None)


_linear_cross_entropy.defvjp(_forward, _backward)


# The scores are computed again for the gradient. Computing the gradient in the forward pass (as
# Liger does) would need the losses' cotangents there: the examples' shares of w's gradient cannot
# be weighted after they are added up.
def compute_gradients(
    gradient_of: Callable[[jax.Array | int], jax.Array],
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    factors: jnp.dtype,
    cut: Cut,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of x, w and b.

    Args:
      gradient_of: returns the gradient of one block's scores, (rows, classes of the block).
      x: (rows, features).
      w: (features, classes).
      b: (classes,).
      factors: the dtype that enters the products.
      cut: the blocks of classes.
    """

    def gradients_of(index: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
        dy, fresh, columns = gradient_of(index), cut.is_fresh(index), cut.slice_block(w, index)
        if fresh is not None:  # an earlier block has added the other classes' part to dx
            columns = jnp.where(checks.lift_rank(fresh, columns), columns, 0)
        db = jnp.sum(dy, 0, dtype=checks.accumulator(x.dtype)).astype(b.dtype)
        return (
            multiply_matrices(dy, columns.T, factors),
            multiply_matrices(x.T, dy, factors).astype(w.dtype),
            db,
        )

    def add_block(
        index: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        dx, dw, db = gradients_of(index)
        return (
            sums[0] + dx,
            cut.replace_block(sums[1], dw, index),
            cut.replace_block(sums[2], db, index),
        )

    if cut.count == 1:
        dx, dw, db = gradients_of(0)
    else:
        accumulated = xla.varying_zeros(x.shape, x, checks.accumulator(x.dtype))
        dx, dw, db = lax.fori_loop(
            0,
            cut.count,
            add_block,
            (accumulated, xla.varying_zeros(w.shape, w), xla.varying_zeros(b.shape, b)),
        )
    return dx.astype(x.dtype), dw, db


def multiply_matrices(left: jax.Array, right: jax.Array, factors: jnp.dtype) -> jax.Array:
    """Return a matrix product, added up in float32 or wider."""
    dtype = checks.accumulator(factors)
    return jnp.matmul(left.astype(factors), right.astype(factors), preferred_element_type=dtype)


def compute_logits(x: jax.Array, w: jax.Array, b: jax.Array, factors: jnp.dtype) -> jax.Array:
    """Return x @ w + b in float32 or wider."""
    scores = multiply_matrices(x, w, factors)
    return scores + checks.lift_rank(b.astype(scores.dtype), scores)


def _scores_of_block(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    factors: jnp.dtype,
    cut: Cut,
    index: jax.Array | int,
) -> jax.Array:
    return compute_logits(x, cut.slice_block(w, index), cut.slice_block(b, index), factors)
