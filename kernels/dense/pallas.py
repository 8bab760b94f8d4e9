"""The dense layer in Pallas kernels: interpreted, or on a GPU by Pallas' Triton lowering."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from txcore.kernels.common import checks, mosaic_blocks, pallas_tiles, random_bits
from txcore.kernels.dense import elementwise
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.dropout import tile_masks

Side = tuple[jax.Array, pallas_tiles.Spec]


@dataclass(frozen=True)
class Config:
    """Hold the tile that one program computes (powers of two from 16), and a GPU's warps for it.

    Args:
      rows: rows of the tile.
      columns: columns of the tile.
      inner: how much of the contracted dim is loaded at once.
      warps: of a program on a GPU.
    """

    rows: int
    columns: int
    inner: int
    warps: int = 4


def list_configs(problem: Problem) -> Sequence[Config]:
    """Return the tiles worth trying, the best guess first."""
    if problem.platform == "tpu":
        return Config(256, 256, 512), Config(512, 256, 512), Config(128, 128, 512)
    if problem.platform != "gpu":  # an interpreter's time goes by the number of programs
        return Config(1024, 1024, 1024), Config(64, 256, 512)
    return Config(64, 64, 32), Config(32, 64, 64), Config(64, 128, 32, warps=8), Config(16, 64, 64)


def explain_refusal_on_tpu(problem: Problem) -> str | None:
    """Return why the kernels cannot compute a problem on a TPU, or None."""
    *batch, features = problem.shapes[0]
    tile = list_configs(problem)[0] if problem.platform == "tpu" else Config(256, 256, 512)
    longest = max(features, problem.shapes[1][1], prod(batch))  # of the dims that are contracted
    size = (tile.rows + tile.columns) * longest * jnp.dtype(problem.dtypes[0]).itemsize
    return mosaic_blocks.explain_refusal(problem) or mosaic_blocks.explain_too_wide(size)


def dense(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    words: jax.Array | None = None,
    offset: jax.Array | None = None,
    *,
    config: Config,
    activation: str | None,
    dropout: float,
) -> jax.Array:
    """Compute the op of `txcore.kernels.dense` on checked operands."""
    if words is not None:
        words = words.reshape(-1, 2)
    rows = x.reshape(-1, x.shape[-1])
    out = _dense(rows, w, b, words, offset, activation, dropout, config)
    return out.reshape(*x.shape[:-1], w.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _dense(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    words: jax.Array | None,
    offset: jax.Array | None,
    activation: str | None,
    dropout: float,
    config: Config,
) -> jax.Array:
    return _compute_layer(x, w, b, words, offset, activation, dropout, config, False)[0]


def _forward(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    words: jax.Array | None,
    offset: jax.Array | None,
    activation: str | None,
    dropout: float,
    config: Config,
) -> tuple[jax.Array, Any]:
    save = elementwise.saves_input(activation)
    out, *more = _compute_layer(x, w, b, words, offset, activation, dropout, config, save)
    saved = more[0] if save else out if activation == "relu" else None
    return out, (x, w, saved, words, offset)


def _compute_layer(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    words: jax.Array | None,
    offset: jax.Array | None,
    activation: str | None,
    dropout: float,
    config: Config,
    save: bool,
) -> list[jax.Array]:
    """Return the layer's output, and with `save` the activation's input."""
    rows = pallas_tiles.block_size(len(x), config.rows)
    columns = pallas_tiles.block_size(w.shape[1], config.columns)

    def finish_tile(y: jax.Array, bias: jax.Array, *seeds: jax.Array) -> list[jax.Array]:
        y, kept = y + bias.astype(y.dtype), None
        if seeds:
            first, second, start = seeds
            kept = random_bits.keep_mask(
                (first, second), tile_masks.tile_counters(start, columns), dropout
            )
        out = elementwise.apply_activation(y, activation, dropout, kept)
        return [out, y] if save else [out]

    bias = (pallas_tiles.pad_to_blocks(b[None], 1, columns), pallas_tiles.row_spec(columns))
    sides = [bias, *tile_masks.mask_operands(words, offset, rows)]
    return _contract_dims(x, w, (1, 0), config, finish_tile, sides, 2 if save else 1)


def _backward(
    activation: str | None, dropout: float, config: Config, residuals: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    x, w, saved, words, offset = residuals
    if not elementwise.needs_mask(activation, dropout):
        words = offset = None
    # A kernel of its own: inside the two products, each tile would compute the mask again.
    dy, db = _compute_derivative(g, saved, words, offset, activation, dropout, config)
    (dx,) = _contract_dims(dy, w, (1, 1), config)
    (dw,) = _contract_dims(x, dy, (0, 0), config)
    return dx, dw, db, None, None


_dense.defvjp(_forward, _backward)


def _contract_dims(
    a: jax.Array,
    b: jax.Array,
    contract: tuple[int, int],
    config: Config,
    finish: Callable[..., list[jax.Array]] = lambda y: [y],
    sides: Sequence[Side] = (),
    results: int = 1,
) -> list[jax.Array]:
    """Contract one dim of each of two matrices, and `finish` each tile before it is written."""
    dtype = checks.accumulator(a.dtype)
    shape = (a.shape[1 - contract[0]], b.shape[1 - contract[1]])
    rows = pallas_tiles.block_size(shape[0], config.rows)
    columns = pallas_tiles.block_size(shape[1], config.columns)
    inner = pallas_tiles.block_size(a.shape[contract[0]], config.inner)

    def load_part(ref: Any, step: Any, dim: int) -> jax.Array:
        where = pallas_tiles.slice_block(step, inner)
        return ref[where, :] if dim == 0 else ref[:, where]  # type: ignore[no-any-return]

    def kernel(a_ref: Any, b_ref: Any, *refs: Any) -> None:
        def add_product(step: Any, total: jax.Array) -> jax.Array:
            pair = load_part(a_ref, step, contract[0]), load_part(b_ref, step, contract[1])
            return total + _contract_tiles(*pair, contract, dtype)

        steps = a_ref.shape[contract[0]] // inner
        total = jax.lax.fori_loop(0, steps, add_product, jnp.zeros((rows, columns), dtype))
        side_refs, out_refs = refs[: len(sides)], refs[len(sides) :]
        for ref, out in zip(out_refs, finish(total, *(r[...] for r in side_refs)), strict=True):
            ref[...] = out.astype(a.dtype)

    a_tile = (rows, inner) if contract[0] else (inner, rows)
    b_tile = (inner, columns) if contract[1] == 0 else (columns, inner)
    a, b = pallas_tiles.pad_to_blocks(a, *a_tile), pallas_tiles.pad_to_blocks(b, *b_tile)
    whole = (a.shape[1 - contract[0]], b.shape[1 - contract[1]])
    a_spec = ((rows, a.shape[1]), lambda i, j: (i, 0))
    if contract[0] == 0:
        a_spec = ((a.shape[0], rows), lambda i, j: (0, i))
    b_spec = ((b.shape[0], columns), lambda i, j: (0, j))
    if contract[1] == 1:
        b_spec = ((columns, b.shape[1]), lambda i, j: (j, 0))
    outs = pallas_tiles.call_kernel(
        kernel,
        (whole[0] // rows, whole[1] // columns),
        [(a, a_spec), (b, b_spec), *sides],
        [(whole, a.dtype, ((rows, columns), lambda i, j: (i, j)))] * results,
        warps=config.warps,
    )
    return [out[: shape[0], : shape[1]] for out in outs]


def _contract_tiles(
    a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: jnp.dtype
) -> jax.Array:
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == dtype else None,
        preferred_element_type=dtype,
    )


def _compute_derivative(
    g: jax.Array,
    saved: jax.Array | None,
    words: jax.Array | None,
    offset: jax.Array | None,
    activation: str | None,
    dropout: float,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients at the activation's input and at the bias."""
    dtype, (count, features) = checks.accumulator(g.dtype), g.shape
    rows = pallas_tiles.block_size(count, config.rows)
    columns = pallas_tiles.block_size(features, config.columns)
    matrices = [pallas_tiles.pad_to_blocks(m, rows, columns) for m in (g, saved) if m is not None]
    height, width = matrices[0].shape
    seeds = tile_masks.mask_operands(words, offset, height)

    def kernel(*refs: Any) -> None:
        *in_refs, dy_ref, db_ref = refs
        matrix_refs, seed_refs = in_refs[: len(matrices)], in_refs[len(matrices) :]
        counters = tile_masks.tile_counters(seed_refs[2][...], columns) if seed_refs else None

        def add_rows(i: Any, db: jax.Array) -> jax.Array:
            where, kept = pallas_tiles.slice_block(i, rows), None
            wide, *more = (ref[where, :].astype(dtype) for ref in matrix_refs)
            if counters is not None:
                key = seed_refs[0][where, :], seed_refs[1][where, :]
                kept = random_bits.keep_mask(key, counters, dropout)
            beside = more[0] if more else None
            dy = elementwise.apply_derivative(wide, beside, activation, dropout, kept)
            dy_ref[where, :] = dy.astype(g.dtype)
            return db + jnp.sum(dy, 0, keepdims=True)

        db = jax.lax.fori_loop(0, height // rows, add_rows, jnp.zeros((1, columns), dtype))
        db_ref[...] = db.astype(g.dtype)

    strip: pallas_tiles.Spec = ((height, columns), lambda i, j: (0, j))
    dy, db = pallas_tiles.call_kernel(
        kernel,
        (1, width // columns),
        [*((m, strip) for m in matrices), *seeds],
        [((height, width), g.dtype, strip), ((1, width), g.dtype, pallas_tiles.row_spec(columns))],
        warps=config.warps,
    )
    return dy[:count, :features], db[0, :features]
