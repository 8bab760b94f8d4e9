"""Dropout as one Pallas kernel over tiles of rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from txcore.kernels.common import checks, pallas_tiles, random_bits
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.dropout import tile_masks


@dataclass(frozen=True)
class Config:
    """Hold the tile that one program computes (powers of two), and a GPU's warps for it."""

    rows: int
    columns: int
    warps: int = 4


def list_configs(problem: Problem) -> Sequence[Config]:
    """Return the tiles worth trying, the best guess first."""
    if problem.platform == "tpu":
        return Config(256, 512), Config(512, 512)
    if problem.platform != "gpu":  # an interpreter's time goes by the number of programs
        return Config(1024, 1024), Config(64, 1024)
    return Config(16, 64), Config(16, 128), Config(32, 128, warps=8)


def dropout(
    x: jax.Array, words: jax.Array, offset: jax.Array, *, config: Config, rate: float
) -> jax.Array:
    """Compute the op of `txcore.kernels.dropout` on rows with one key each."""
    return _dropout(x, words, offset, rate, config)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _dropout(
    x: jax.Array, words: jax.Array, offset: jax.Array, rate: float, config: Config
) -> jax.Array:
    (count, features), share = x.shape, random_bits.keep_share(rate)
    rows = pallas_tiles.block_size(count, config.rows)
    columns = pallas_tiles.block_size(features, config.columns)

    def kernel(x_ref: Any, first_ref: Any, second_ref: Any, offset_ref: Any, out_ref: Any) -> None:
        counters = tile_masks.tile_counters(offset_ref[...], columns)
        kept = random_bits.keep_mask((first_ref[...], second_ref[...]), counters, rate)
        wide = x_ref[...].astype(checks.accumulator(x.dtype))
        out_ref[...] = jnp.where(kept, wide / share, 0).astype(x.dtype)

    padded = pallas_tiles.pad_to_blocks(x, rows, columns)
    tile: pallas_tiles.Spec = ((rows, columns), lambda i, j: (i, j))
    (out,) = pallas_tiles.call_kernel(
        kernel,
        (padded.shape[0] // rows, padded.shape[1] // columns),
        [(padded, tile), *tile_masks.mask_operands(words, offset, rows)],
        [(padded.shape, x.dtype, tile)],
        warps=config.warps,
    )
    return out[:count, :features]


def _forward(
    x: jax.Array, words: jax.Array, offset: jax.Array, rate: float, config: Config
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dropout(x, words, offset, rate, config), (words, offset)


def _backward(
    rate: float, config: Config, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, None, None]:
    return _dropout(g, *residuals, rate, config), None, None


_dropout.defvjp(_forward, _backward)
