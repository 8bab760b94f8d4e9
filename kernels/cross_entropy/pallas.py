"""The loss in Pallas kernels over tiles of a linear layer's scores.

Each program computes the statistics of one tile. They are combined outside of the kernel, so that
no program waits for another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from txcore.kernels.common import checks, pallas_tiles
from txcore.kernels.cross_entropy import online
from txcore.kernels.cross_entropy.blocks import Cut, LossTiles
from txcore.kernels.dispatch.problem import Problem

Operand = tuple[jax.Array, pallas_tiles.Spec]


@dataclass(frozen=True)
class Source:
    """Hold where the scores come from.

    Attributes:
      shape: (rows, classes) of all scores.
      tile: (rows, classes) of one tile.
      operands: the arrays that a program computes its scores from.
      read: returns a tile of scores, given a reference to each operand's block.
      warps: of a program on a GPU.
    """

    shape: tuple[int, int]
    tile: tuple[int, int]
    operands: Sequence[Operand]
    read: Callable[..., jax.Array]
    warps: int

    @property
    def grid(self) -> tuple[int, int]:
        """The number of tiles along each dim."""
        rows, classes = (
            max(-(-size // unit), 1) for size, unit in zip(self.shape, self.tile, strict=True)
        )
        return rows, classes


def list_configs(problem: Problem) -> Sequence[LossTiles]:
    """Return the tiles worth trying, the best guess first."""
    if problem.platform == "tpu":
        return LossTiles(256, 512, features=512), LossTiles(512, 512, features=512)
    if problem.platform != "gpu":  # an interpreter's time goes by the number of programs
        return LossTiles(512, 1024, features=1024), LossTiles(64, 256, features=64, block=1024)
    return LossTiles(16, 512), LossTiles(64, 64), LossTiles(64, 128, warps=8)


def compute_stats(source: Source, labels: jax.Array, smoothing: float) -> online.Stats:
    """Compute the statistics of all scores."""
    from jax.experimental import pallas as pl

    (count, classes), (rows, columns), (height, width) = source.shape, source.tile, source.grid
    dtype = checks.accumulator(source.operands[0][0].dtype)

    def kernel(labels_ref: Any, *refs: Any) -> None:
        in_refs, out_refs = refs[: len(source.operands)], refs[len(source.operands) :]
        start = pl.program_id(1) * columns
        chosen = online.is_label(labels_ref[:, 0], start, columns)
        counted = None
        if classes % columns:
            counted = start + jax.lax.broadcasted_iota(jnp.int32, (1, columns), 1) < classes
        known = online.block_stats(source.read(*in_refs), chosen, counted, smoothing)
        for ref, part in zip(out_refs, jax.tree.leaves(known), strict=True):
            ref[...] = part[:, None]

    # A column for each tile of classes, since a TPU's block takes whole rows of a matrix.
    result = ((width, height * rows, 1), dtype, ((None, rows, 1), lambda i, j: (j, i, 0)))
    parts = pallas_tiles.call_kernel(
        kernel,
        (height, width),
        [_column_operand(labels, rows), *source.operands],
        [result] * (4 if smoothing else 3),
        warps=source.warps,
    )
    top, total, label, *lag = (part[:, :count, 0] for part in parts)
    return online.combine_stats(
        online.Stats(top, total, label, lag[0] if lag else None), Cut(classes, columns).fresh
    )


def compute_gradient(
    source: Source,
    labels: jax.Array,
    normalizer: online.Normalizer,
    g: jax.Array,
    classes: int,
    smoothing: float,
    dtype: jnp.dtype,
) -> jax.Array:
    """Return the gradient of a source's scores; the source may be a block of all `classes`."""
    from jax.experimental import pallas as pl

    (rows, columns), (height, width) = source.tile, source.grid

    def kernel(*refs: Any) -> None:
        *in_refs, out_ref = refs
        row_labels, top, log_total, row_g = (ref[:, 0] for ref in in_refs[:4])
        chosen = online.is_label(row_labels, pl.program_id(1) * columns, columns)
        out_ref[...] = online.block_gradient(
            source.read(*in_refs[4:]),
            chosen,
            online.Normalizer(top, log_total),
            row_g,
            classes,
            smoothing,
        ).astype(dtype)

    (out,) = pallas_tiles.call_kernel(
        kernel,
        (height, width),
        [*(_column_operand(side, rows) for side in (labels, *normalizer, g)), *source.operands],
        [((height * rows, width * columns), dtype, ((rows, columns), lambda i, j: (i, j)))],
        warps=source.warps,
    )
    return out[: source.shape[0], : source.shape[1]]


def _column_operand(vector: jax.Array, rows: int) -> Operand:
    return pallas_tiles.pad_to_blocks(vector[:, None], rows, 1), pallas_tiles.column_spec(rows)
