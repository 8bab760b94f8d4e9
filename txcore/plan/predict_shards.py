"""What sharded state makes a training step communicate."""

import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from txcore.collectives import _leaves
from txcore.layout import Layout, shape_of_part
from txcore.mesh import MeshSpec
from txcore.optim.optimizer import Exchange
from txcore.parallel.predicted import Predicted
from txcore.plan.data_parallel import DP

AGAIN = "parameters again"

Pairs = list[tuple[Any, Layout]]


def predict_shards(pairs: Pairs, mesh: MeshSpec, dp: DP | None) -> list[Predicted]:
    """Predict the exchange of the parameters whose state is sharded, the others left out.

    A gradient is reduce-scattered over the axes that split it, and its part averaged over the
    others; a parameter is gathered once, after the update, or in the forward pass where it is
    stored in parts itself. Then it is gathered again in the backward pass, if that needs it: the
    first layer's weights and biases are not needed there, which the model knows alone.

    Args:
      pairs: each parameter, or its shape, and its layout.
      mesh: the devices and their axes.
      dp: what is sharded.
    """
    if dp is None or dp.shard is None:
        return []
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
        if layout.gathered and dp.reshard_after_forward:
            sent.setdefault((AGAIN, "all-gather", axes, dtype), []).append(whole)

    def in_loop(kind: str) -> bool:
        gathers = kind == "all-gather" and dp.shard == "parameters"
        return gathers or (kind == "reduce-scatter" and dp.shard != "optimizer")

    return [
        Predicted(*key, tuple(elements), at_most=key[0] == AGAIN, per_microbatch=in_loop(key[1]))
        for key, elements in sent.items()
    ]


def predict_optimizer(exchanges: Iterable[Exchange]) -> list[Predicted]:
    """Predict what an optimizer sends, of one kind over the same axes together."""
    sent: dict[tuple[str, tuple[str, ...], str], list[int]] = {}
    for kind, axes, dtype, elements in exchanges:
        sent.setdefault((kind, axes, dtype), []).append(elements)
    return [Predicted("optimizer", *key, tuple(elements)) for key, elements in sent.items()]
