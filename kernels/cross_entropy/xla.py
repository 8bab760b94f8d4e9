"""The loss in XLA's own ops, by blocks of classes: no gather forward, no scatter backward."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from txcore import varying
from txcore.kernels.common import checks
from txcore.kernels.cross_entropy import online
from txcore.kernels.cross_entropy.blocks import ClassBlocks, Cut
from txcore.kernels.dispatch.problem import Problem

Residuals = tuple[jax.Array, jax.Array, online.Normalizer]


def configs(problem: Problem) -> list[ClassBlocks]:
    """Return the block sizes worth trying."""
    shape = problem.shapes[0]
    sizes = block_sizes(math.prod(shape[:-1]), shape[-1])
    # XLA:CPU writes all scores and their exponentials to memory in float32; the compilers for
    # GPU and TPU fuse them into the sums.
    if problem.platform != "cpu":
        sizes.sort(reverse=True)
    return [ClassBlocks(size) for size in sizes]


def block_sizes(rows: int, classes: int) -> list[int]:
    """Return how many classes to look at at a time, the best guess first."""
    blocks = [size for size in (1024, 4096, 256) if size < classes]
    few = classes <= 1024 or rows * classes <= 2**20  # 4 MiB of float32: stays in a cache
    return [classes, *blocks] if few else [*blocks, classes]


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
        scores, chosen = _block(logits, labels, cut, index)
        return online.stats(scores, chosen, cut.is_fresh(index), smoothing)

    known = online.combine(over_blocks(part, cut), cut.fresh)
    loss, normalizer = online.losses(known, labels, cut.length, smoothing)
    return loss, (logits, labels, normalizer)


def _backward(
    block: int, smoothing: float, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, None]:
    logits, labels, normalizer = residuals
    cut = Cut.evenly(logits.shape[-1], block)

    def part(index: jax.Array | int) -> jax.Array:
        scores, chosen = _block(logits, labels, cut, index)
        change = online.gradient(scores, chosen, normalizer, g, cut.length, smoothing)
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
    chosen = online.is_label(labels, cut.start(index), cut.size)
    return scores.astype(checks.accumulator(scores.dtype)), chosen


def over_blocks(part: Callable[[jax.Array | int], online.Stats], cut: Cut) -> online.Stats:
    """Return what `part` knows of each block, stacked."""
    if cut.count == 1:
        return jax.tree.map(lambda x: x[None], part(0))
    return lax.map(part, jnp.arange(cut.count))


def zeros(shape: tuple[int, ...], like: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Return zeros to be overwritten with what varies along the axes that `like` varies along."""
    return varying.match_varying(jnp.zeros(shape, dtype or like.dtype), like)[0]
