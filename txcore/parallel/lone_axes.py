"""Axes of one device: a value is typed as equal along them without a collective."""

import jax

from txcore.collectives import _leaves, pmean


def make_equal_along_lone_axes(x: jax.Array, axes: tuple[str, ...], name: str) -> jax.Array:
    """Return an array that does not vary along those of some axes that have one device.

    A mean over one device is the value itself, so nothing is sent.
    """
    lone = [a for a in axes if _leaves.axes_size((a,)) == 1 and _leaves.varies_along(x, a)]
    return pmean(x, tuple(lone), name=name) if lone else x
