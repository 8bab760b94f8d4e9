"""The convolution of few input channels: one matrix product over the patches of pooling windows.

The patch of a 2x2 window holds the inputs of its 4 outputs. The filter is placed into it 4 times,
and one product gives the 4 outputs. Without a pool, a window is one output. A value that is not
finite spreads over the windows whose patches hold it.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from txcore.kernels.conv.windows_geometry import Windows


def place_filters(w: jax.Array, at: Windows) -> list[jax.Array]:
    """Return the filter at each of its places in a patch, [patch, out_channels] each."""
    places = [(i, j) for i in range(at.stride) for j in range(at.stride)]
    last = at.stride - 1
    copies = [jnp.pad(w, ((i, last - i), (j, last - j), (0, 0), (0, 0))) for i, j in places]
    return [copy.reshape(-1, w.shape[3]) for copy in copies]


def forward(x: jax.Array, placed: Sequence[jax.Array], at: Windows) -> list[jax.Array]:
    """Return the outputs of every window, row by row, from what `place_filters` returned."""
    patches = _gather_patches(x, at)
    flat = patches.reshape(-1, patches.shape[3])
    return [(flat @ p).reshape(*patches.shape[:3], p.shape[1]) for p in placed]


def backward(
    x: jax.Array, placed: Sequence[jax.Array], dy: Sequence[jax.Array], at: Windows
) -> tuple[jax.Array, list[jax.Array]]:
    """Return the gradients of x and of the placed filters.

    Args:
      x: the images.
      placed: what `place_filters` returned.
      dy: gradients of the outputs of every window, each [batch, rows, columns, channels].
      at: the windows.
    """
    patches = _gather_patches(x, at)
    flat = patches.reshape(-1, patches.shape[3])
    dy = [d.reshape(-1, d.shape[3]) for d in dy]
    dpatches = functools.reduce(jnp.add, [d @ p.T for d, p in zip(dy, placed, strict=True)])
    (dx,) = jax.linear_transpose(lambda x: _gather_patches(x, at), x)(
        dpatches.reshape(patches.shape)
    )
    return dx, [flat.T @ d for d in dy]


def _gather_patches(x: jax.Array, at: Windows) -> jax.Array:
    """Return the patch of every window, [batch, rows, columns, patch]."""
    spans = at.stride * (at.rows - 1) + 1, at.stride * (at.columns - 1) + 1
    below = spans[0] + at.height - 1 - at.top - x.shape[1]
    right = spans[1] + at.width - 1 - at.left - x.shape[2]
    zero = jnp.zeros((), x.dtype)
    x = lax.pad(x, zero, [(0, 0, 0), (at.top, below, 0), (at.left, right, 0), (0, 0, 0)])
    shifted = [
        x[:, i : i + spans[0] : at.stride, j : j + spans[1] : at.stride]
        for i in range(at.height)
        for j in range(at.width)
    ]
    return jnp.concatenate(shifted, axis=3)
