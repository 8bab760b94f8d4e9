"""The operands from which a Pallas kernel computes the dropout mask of its tile."""

import jax
import jax.numpy as jnp

from txcore.kernels.common import pallas_tiles


def mask_operands(
    words: jax.Array | None, offset: jax.Array | None, rows: int
) -> list[tuple[jax.Array, pallas_tiles.Spec]]:
    """Return the two words of each row's key, and the offset; nothing without keys."""
    if words is None or offset is None:
        return []
    first, second = (pallas_tiles.pad_to_blocks(words[:, i : i + 1], rows, 1) for i in (0, 1))
    scalar = (offset.reshape(1, 1), pallas_tiles.SCALAR)
    return [
        (first, pallas_tiles.column_spec(rows)),
        (second, pallas_tiles.column_spec(rows)),
        scalar,
    ]


def tile_counters(offset: jax.Array, columns: int) -> jax.Array:
    """Return the counters of this tile's features, shape (1, columns)."""
    from jax.experimental import pallas as pl

    start = offset + (pl.program_id(1) * columns).astype(jnp.uint32)
    return start + jax.lax.broadcasted_iota(jnp.uint32, (1, columns), 1)
