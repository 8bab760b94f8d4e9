"""The loss in XLA's own ops, by blocks of classes, without a gather or a scatter."""

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


def list_configs(problem: Problem) -> list[ClassBlocks]:
    """Return the block sizes worth trying, the best guess first."""
    shape = problem.shapes[0]
    sizes = block_sizes(math.prod(shape[:-1]), shape[-1])
    # Small blocks first on CPU, where XLA writes all scores and their exponentials to memory in
    # float32. The compilers for GPU and TPU fuse them into the sums.
    if problem.platform != "cpu":
        sizes.sort(reverse=True)
    return [ClassBlocks(size) for size in sizes]


def block_sizes(rows: int, classes: int) -> list[int]:
    """Return how many classes to read at a time, the best guess first."""
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
    cut = Cut.into_even_blocks(logits.shape[-1], block)

    def stats_of(index: jax.Array | int) -> online.Stats:
        scores, chosen = _slice_scores(logits, labels, cut, index)
        return online.block_stats(scores, chosen, cut.is_fresh(index), smoothing)

    known = online.combine_stats(over_blocks(stats_of, cut), cut.fresh)
    loss, normalizer = online.compute_losses(known, labels, cut.length, smoothing)
    return loss, (logits, labels, normalizer)


def _backward(
    block: int, smoothing: float, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, None]:
    logits, labels, normalizer = residuals
    cut = Cut.into_even_blocks(logits.shape[-1], block)

    def gradient_of(index: jax.Array | int) -> jax.Array:
        scores, chosen = _slice_scores(logits, labels, cut, index)
        change = online.block_gradient(scores, chosen, normalizer, g, cut.length, smoothing)
        return change.astype(logits.dtype)

    if cut.count == 1:
        return gradient_of(0), None
    return lax.fori_loop(
        0,
        cut.count,
        lambda i, out: cut.replace_block(out, gradient_of(i), i),
        varying_zeros(logits.shape, logits),
    ), None


_cross_entropy.defvjp(_forward, _backward)


def _slice_scores(
    logits: jax.Array, labels: jax.Array, cut: Cut, index: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    scores = cut.slice_block(logits, index)
    chosen = online.is_label(labels, cut.start_of(index), cut.size)
    return scores.astype(checks.accumulator(scores.dtype)), chosen


def over_blocks(stats_of: Callable[[jax.Array | int], online.Stats], cut: Cut) -> online.Stats:
    """Return the statistics of every block, stacked: `stats_of(index)` gives those of one."""
    if cut.count == 1:
        return jax.tree.map(lambda x: x[None], stats_of(0))
    return lax.map(stats_of, jnp.arange(cut.count))


def varying_zeros(
    shape: tuple[int, ...], like: jax.Array, dtype: jnp.dtype | None = None
) -> jax.Array:
    """Return zeros that vary along the mesh axes that `like` varies along, as a loop's carry."""
    return varying.match_varying(jnp.zeros(shape, dtype or like.dtype), like)[0]
