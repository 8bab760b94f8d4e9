"""The loss of logits in Pallas kernels that go along the rows: interpreted, or on a GPU.

The losses' kernel reads each row once. Every thread keeps the largest of its own scores and their
sum of exponentials (the online normalizer); the threads are combined once, at the row's end. The
gradient's kernel reads the row again and writes. Nothing is padded: a row's odd end is masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from txcore.kernels.common import checks
from txcore.kernels.common import pallas_masked as masked
from txcore.kernels.cross_entropy import online
from txcore.kernels.cross_entropy.derivatives import make_cross_entropy
from txcore.kernels.dispatch.problem import Problem


@dataclass(frozen=True)
class LossRuns:
    """Configure implementation="pallas_triton" of `cross_entropy`.

    Args:
      classes: how many of a row's classes a program reads at a time, a power of two from 16.
      programs: among how many programs a row is divided for the losses.
      warps: of a program on a GPU.
    """

    classes: int
    programs: int = 1
    warps: int = 4

    def __post_init__(self) -> None:
        if (
            self.classes < 16
            or self.classes & (self.classes - 1)
            or min(self.programs, self.warps) < 1
        ):
            raise ValueError(
                "LossRuns: classes needs a power of two from 16, and programs and warps at least "
                f"1, got {self}"
            )


def list_configs(problem: Problem) -> Sequence[LossRuns]:
    """Return the runs worth trying, the best guess first."""
    classes = problem.shapes[0][-1]
    largest = max(16, 1 << max(classes - 1, 0).bit_length())
    if problem.platform != "gpu":  # an interpreter's time goes by the number of programs
        return (LossRuns(min(4096, largest)),)
    sizes = ((1024, 4), (2048, 4), (4096, 4))
    made = [LossRuns(min(size, largest), warps=warps) for size, warps in sizes]
    return list(dict.fromkeys(made))


def explain_refusal(problem: Problem) -> str | None:
    """Return why the kernels cannot compute a problem, or None."""
    return masked.explain_too_large(int(np.prod(problem.shapes[0], dtype=np.int64)))


def _compute_stats(
    logits: jax.Array, labels: jax.Array, config: LossRuns, smoothing: float
) -> online.Stats:
    """Compute the statistics of all logits."""
    from jax.experimental import pallas as pl

    (rows, classes), size = logits.shape, config.classes
    dtype = checks.accumulator(logits.dtype)
    steps = -(-classes // (size * config.programs))  # of a program
    span = steps * size
    programs = -(-classes // span)
    if not rows:
        return online.Stats(*(jnp.zeros(0, dtype),) * 3, jnp.zeros(0, dtype) if smoothing else None)
    lowest = float(jnp.finfo(dtype).min)  # -inf would give NaN for classes that are ruled out

    def kernel(logits_ref: Any, labels_ref: Any, *out_refs: Any) -> None:
        row, program = pl.program_id(0), pl.program_id(1)
        start, end = program * span, jnp.minimum((program + 1) * span, classes)

        def add_scores(
            index: Any, known: tuple[jax.Array, ...], inside: bool
        ) -> tuple[jax.Array, ...]:
            place = masked.count_from(start + index * size, size)
            counted = None if inside else place < end
            scores = masked.load(logits_ref, row * classes + place, counted, -jnp.inf).astype(dtype)
            top, total, *lag = known
            higher = jnp.maximum(top, scores)
            # One exponential serves both cases: the score to add, or the factor of the old sum.
            ratio = jnp.exp(-jnp.abs(scores - top))
            total = jnp.where(scores > top, total * ratio + 1, total + ratio)
            if lag:
                seen = jnp.asarray(index, dtype)
                more = seen * (higher - top) + (higher - scores)
                lag = [lag[0] + (more if counted is None else jnp.where(counted, more, 0))]
            return (higher, total, *lag)

        zero = jnp.zeros(size, dtype)
        known = (jnp.full(size, lowest, dtype), zero, *((zero,) if smoothing else ()))
        whole = (end - start) // size
        known = lax.fori_loop(0, whole, lambda i, k: add_scores(i, k, True), known)
        if classes % size:
            known = lax.cond(
                start + whole * size < end, lambda: add_scores(whole, known, False), lambda: known
            )
        top, total, *lag = known
        row_top = jnp.max(top)
        label = masked.load(labels_ref, row)
        chosen = (label >= start) & (label < end)
        place = row * classes + jnp.where(chosen, label, 0).astype(jnp.int32)
        score = jnp.where(chosen, masked.load(logits_ref, place).astype(dtype), 0)
        parts = [row_top, jnp.sum(total * jnp.exp(top - row_top)), score]
        if lag:
            place = masked.count_from(start, size)
            seen = jnp.maximum(0, (end - place + size - 1) // size).astype(dtype)
            parts.append(jnp.sum(jnp.where(seen > 0, lag[0] + seen * (row_top - top), 0)))
        for ref, part in zip(out_refs, parts, strict=True):
            masked.store(ref, program * rows + row, part)

    results = [(programs * rows, dtype)] * (4 if smoothing else 3)
    found = masked.call_kernel(
        kernel, (rows, programs), results, logits, labels, warps=config.warps
    )
    top, total, label, *lag = (part.reshape(programs, rows) for part in found)
    counts = np.minimum(span, classes - np.arange(programs) * span)
    return online.combine_stats(online.Stats(top, total, label, lag[0] if lag else None), counts)


def _compute_gradient(
    logits: jax.Array,
    labels: jax.Array,
    normalizer: online.Normalizer,
    g: jax.Array,
    config: LossRuns,
    smoothing: float,
) -> jax.Array:
    from jax.experimental import pallas as pl

    (rows, classes), size = logits.shape, config.classes
    dtype = checks.accumulator(logits.dtype)
    if not rows:
        return logits

    def kernel(*refs: Any) -> None:
        logits_ref, *row_refs, out_ref = refs
        row = pl.program_id(0)
        label, top, log_total, row_g = (masked.load(ref, row) for ref in row_refs)
        place = masked.count_from(pl.program_id(1) * size, size)
        counted = place < classes if classes % size else None
        scores = masked.load(logits_ref, row * classes + place, counted).astype(dtype)
        chosen = place == label
        out = online.block_gradient(
            scores, chosen, online.Normalizer(top, log_total), row_g, classes, smoothing
        )
        masked.store(out_ref, row * classes + place, out, counted)

    (out,) = masked.call_kernel(
        kernel,
        (rows, -(-classes // size)),
        [(rows * classes, logits.dtype)],
        *(logits, labels, *normalizer, g),
        warps=config.warps,
    )
    return out.reshape(rows, classes)


cross_entropy = make_cross_entropy(_compute_stats, _compute_gradient)
