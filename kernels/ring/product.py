"""A matrix product inside of a ring's kernel: tiles stream from HBM through vector memory."""

from typing import Any

import jax
import jax.numpy as jnp

from txcore.kernels.ring.blocks import LANES

# Of a tile's row: 512 bfloat16. The compiler writes the product of a tile out, for float32 in
# several passes: tiles of 512 of them took it four times as long.
_LARGEST_BYTES = 1024


def round_up(size: int, unit: int) -> int:
    """Return the next multiple of a unit, at least one."""
    return max(-(-size // unit), 1) * unit


def pad_matrix(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Return matrices (..., rows, columns) with zeros behind what they hold."""
    missing = (rows - x.shape[-2], columns - x.shape[-1])
    if missing == (0, 0):
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size) for size in missing])


def tile_of(size: int, unit: int, itemsize: int) -> int:
    """Return the largest tile that divides a size and is a multiple of the unit."""
    most = min(size, _LARGEST_BYTES // itemsize) // unit * unit
    fits = (n for n in range(most, unit, -unit) if size % n == 0)
    return next(fits, unit)


def accumulator(x: jax.Array, columns: int) -> Any:
    """Return the scratch type in which `multiply` adds up a tile of its result.

    Args:
      x: (..., rows, inner), of whole tiles.
      columns: of the result.
    """
    from jax.experimental.pallas import tpu as pltpu

    itemsize = x.dtype.itemsize
    rows = tile_of(x.shape[-2], 32 // itemsize, itemsize)
    return pltpu.VMEM((rows, tile_of(columns, LANES, itemsize)), jnp.float32)


def multiply(x: Any, w: Any, out: Any, total: Any, added: Any = None) -> None:
    """Write x @ w, plus what is to be added, to a reference in HBM.

    Args:
      x, w, out: references to matrices of whole tiles, of one dtype.
      total: a reference in vector memory, of one tile of `out`, float32.
      added: a reference like `out`, or None.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, columns = total.shape
    inner = tile_of(x.shape[1], LANES, x.dtype.itemsize)
    steps = x.shape[1] // inner
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def add_tile(*refs: Any) -> None:
        *given, x_tile, w_tile, out_tile = refs
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _() -> None:
            start = given[0][...].astype(jnp.float32) if given else jnp.zeros_like(total)
            total[...] = start

        total[...] += jnp.dot(
            x_tile[...], w_tile[...], precision=exact, preferred_element_type=jnp.float32
        )

        @pl.when(step == steps - 1)
        def _() -> None:
            out_tile[...] = total[...].astype(out_tile.dtype)

    result = pl.BlockSpec((rows, columns), lambda i, j, step: (i, j))
    pltpu.emit_pipeline(
        add_tile,
        grid=(out.shape[0] // rows, out.shape[1] // columns, steps),
        in_specs=[
            *([] if added is None else [result]),
            pl.BlockSpec((rows, inner), lambda i, j, step: (i, step)),
            pl.BlockSpec((inner, columns), lambda i, j, step: (step, j)),
        ],
        out_specs=[result],
    )(*([] if added is None else [added]), x, w, out)
