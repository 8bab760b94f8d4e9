"""The loss in XLA's own ops, by blocks of classes: no gather forward, no scatter backward."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from txcore import _compat
from txcore.kernels import checks
from txcore.kernels.cross_entropy import online
from txcore.kernels.cross_entropy.blocks import ClassBlocks, Cut
from txcore.kernels.problem import Problem

Residuals = tuple[jax.Array, jax.Array, online.Normalizer]


def configs(problem: Problem) -> list[ClassBlocks]:
    """Return the block sizes worth trying."""
    classes = problem.shapes[0][-1]
    blocks = [ClassBlocks(size) for size in (4096, 1024, 16384) if size < classes]
    # XLA:CPU writes all scores and their exponentials to memory in float32; the compilers for
    # GPU and TPU fuse them into the sums.
    whole = ClassBlocks(classes)
    return [*blocks, whole] if problem.platform == "cpu" else [whole, *blocks]


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, config: ClassBlocks, label_smoothing: float
) -> jax.Array:
    """Compute the op of `txcore.kernels.cross_entropy` on checked operands."""
    return _cross_entropy(logits, labels, config.classes, label_smoothing)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cross_entropy(logits: jax.Array, labels: jax.Array, block: int, smoothing: float) -> jax.Array:
    return _forward(logits, labels, block, smoothing)[0]


def _forward(
    logits: jax.Array, labels: jax.Array, block: int, smoothing: float
) -> tuple[jax.Array, Residuals]:
    cut = Cut.evenly(logits.shape[-1], block)

    def part(index: jax.Array | int) -> online.Stats:
        scores, is_label = _block(logits, labels, cut, index)
        return online.stats(scores, is_label, cut.is_fresh(index), smoothing)

    known = online.combine(over_blocks(part, cut), cut.fresh)
    loss, normalizer = online.losses(known, labels, cut.length, smoothing)
    return loss, (logits, labels, normalizer)


def _backward(
    block: int, smoothing: float, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, None]:
    logits, labels, normalizer = residuals
    cut = Cut.evenly(logits.shape[-1], block)

    def part(index: jax.Array | int) -> jax.Array:
        scores, is_label = _block(logits, labels, cut, index)
        change = online.gradient(scores, is_label, normalizer, g, cut.length, smoothing)
        return change.astype(logits.dtype)

    if cut.count == 1:
        return part(0), None
    return lax.fori_loop(
        0, cut.count, lambda i, out: cut.update(out, part(i), i), zeros(logits.shape, logits)
    ), None


_cross_entropy.defvjp(_forward, _backward)


def _block(
    logits: jax.Array, labels: jax.Array, cut: Cut, index: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    scores = cut.slice(logits, index)
    return scores.astype(checks.accumulator(scores.dtype)), is_label(labels, cut, index)


def over_blocks(part: Callable[[jax.Array], online.Stats], cut: Cut) -> online.Stats:
    """Return what `part` knows of each block, stacked."""
    if cut.count == 1:
        return jax.tree.map(lambda x: x[None], part(0))
    return lax.map(part, jnp.arange(cut.count))


def is_label(labels: jax.Array, cut: Cut, index: jax.Array | int) -> jax.Array:
    """Tell which class of a block is each row's label."""
    shape = (*labels.shape, cut.size)
    classes = lax.broadcasted_iota(labels.dtype, shape, labels.ndim)
    return classes + cut.start(index).astype(labels.dtype) == labels[..., None]


def zeros(shape: tuple[int, ...], like: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Return zeros to be overwritten with what varies along the axes that `like` varies along."""
    return _compat.match_varying(jnp.zeros(shape, dtype or like.dtype), like)[0]
