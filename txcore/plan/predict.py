"""What a plan itself makes a training step communicate."""

import math
from typing import Any

import jax.numpy as jnp

from txcore.collectives import _leaves
from txcore.kernels.common import checks
from txcore.layout import Layout
from txcore.mesh import MeshSpec
from txcore.parallel.gradients.adasum import packed_columns
from txcore.parallel.local_sgd import Rounds
from txcore.parallel.predicted import Predicted


def predict_gradients(pairs: list[tuple[Any, Layout]], mesh: MeshSpec) -> list[Predicted]:
    """Predict one all-reduce for each dtype and axes, of parameters with their layouts."""
    sizes: dict[tuple[tuple[str, ...], str], list[int]] = {}
    for leaf, layout in pairs:
        if not (layout.reduced and leaf.size and jnp.issubdtype(leaf.dtype, jnp.inexact)):
            continue
        if layout.scattered is not None:  # by predict_shards
            continue
        parts = math.prod(mesh.shape[axis] for axis in layout.norm_axes)
        key = layout.reduced, _leaves.mean_dtype(leaf.dtype).name
        sizes.setdefault(key, []).append(leaf.size // parts)
    return [
        Predicted("gradients", "all-reduce", axes, dtype, tuple(elements))
        for (axes, dtype), elements in sizes.items()
    ]


def predict_average(
    pairs: list[tuple[Any, Layout]], mesh: MeshSpec, rounds: Rounds
) -> list[Predicted]:
    """Predict the exchange of local SGD: all parameters at the end of a round, float32 or wider."""
    sizes: dict[str, list[int]] = {}
    for leaf, layout in pairs:
        parts = math.prod(mesh.shape[axis] for axis in layout.norm_axes)
        if leaf.size:
            dtype = jnp.dtype(checks.accumulator(leaf.dtype)).name
            sizes.setdefault(dtype, []).append(leaf.size // parts)
    if not rounds.axes:
        return []
    return [
        Predicted("parameters", "all-reduce", rounds.axes, dtype, tuple(n), every=rounds.every)
        for dtype, n in sizes.items()
    ]


def predict_adasum(pairs: list[tuple[Any, Layout]], mesh: MeshSpec) -> list[Predicted]:
    """Predict what joining gradients in pairs sends, for each dtype that it computes in."""
    axes = next((layout.reduced for _, layout in pairs), ())
    if not axes:
        return []
    devices = math.prod(mesh.shape[axis] for axis in axes)
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for leaf, _ in pairs:
        dtype = jnp.dtype(checks.accumulator(leaf.dtype)).name
        shapes.setdefault(dtype, []).append(leaf.shape)
    predicted = []
    for dtype, own in shapes.items():
        columns = sum(packed_columns(own, devices))
        halves = [columns * (devices >> level) for level in range(1, devices.bit_length())]
        products = [3 * devices * len(own)] * len(halves)
        predicted += [
            Predicted("halves of gradients", "collective-permute", axes, dtype, tuple(halves)),
            Predicted("products of gradients", "all-gather", axes, dtype, tuple(products)),
            Predicted("joined gradients", "all-gather", axes, dtype, (columns * devices,)),
        ]
    return predicted


def predict_norms(pairs: list[tuple[Any, Layout]]) -> list[Predicted]:
    """Predict the sums of squared norms over parts: one scalar for each set of axes."""
    wide = [checks.accumulator(leaf.dtype) for leaf, _ in pairs]
    dtype = jnp.dtype(checks.common_dtype(jnp.float32, *wide)).name
    of_parts = dict.fromkeys(layout.norm_axes for _, layout in pairs if layout.norm_axes)
    return [Predicted("gradient norm", "all-reduce", axes, dtype, (1,)) for axes in of_parts]
