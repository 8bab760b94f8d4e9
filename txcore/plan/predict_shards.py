"""What sharded state makes a training step communicate."""

import math
from typing import Any

import jax.numpy as jnp

from txcore.collectives import _leaves
from txcore.layout import Layout, shape_of_part
from txcore.mesh import MeshSpec
from txcore.parallel.predicted import Predicted

AGAIN = "parameters again"

Pairs = list[tuple[Any, Layout]]


def predict_shards(pairs: Pairs, mesh: MeshSpec, *, again: bool = True) -> list[Predicted]:
    """Predict the exchange of the parameters whose state is sharded, the others left out.

    A gradient is reduce-scattered over the axes that split it, and its part averaged over the
    others; a parameter is gathered once, after the update, or in the forward pass where it is
    stored in parts itself. Then it is gathered again in the backward pass, if that needs it: the
    first layer's weights and biases are not needed there, which the model knows alone.

    Args:
      pairs: each parameter, or its shape, and its layout.
      mesh: the devices and their axes.
      again: whether the backward pass gathers what the forward pass did.
    """
    sent: dict[tuple[str, str, tuple[str, ...], str], list[int]] = {}
    for leaf, layout in pairs:
        if layout.scattered is None or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        _, axes = layout.scattered
        rest = tuple(axis for axis in layout.reduced if axis not in axes)
        whole = math.prod(shape_of_part(leaf.shape, layout.view, mesh.shape))
        part = math.prod(shape_of_part(leaf.shape, layout.gradient, mesh.shape))
        dtype, of_mean = leaf.dtype.name, _leaves.mean_dtype(leaf.dtype).name
        sent.setdefault(("gradients", "reduce-scatter", axes, of_mean), []).append(whole)
        if rest:
            sent.setdefault(("gradients", "all-reduce", rest, of_mean), []).append(part)
        sent.setdefault(("parameters", "all-gather", axes, dtype), []).append(whole)
        if layout.gathered and again:
            sent.setdefault((AGAIN, "all-gather", axes, dtype), []).append(whole)
    return [
        Predicted(*key, tuple(elements), at_most=key[0] == AGAIN) for key, elements in sent.items()
    ]
