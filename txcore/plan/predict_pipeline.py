"""What a pipeline makes a training step communicate."""

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from txcore.layout import shape_of_part
from txcore.mesh import MeshSpec
from txcore.parallel.predicted import Predicted
from txcore.plan.pipeline_parallel import PP
from txcore.plan.rules import is_of_blocks

if TYPE_CHECKING:
    from txcore.parallel.pipeline.schedule import Schedule

_NAMES = {"F": "activations", "B": "cotangents"}


def predict_pipeline(
    pp: PP | None, shapes: Any, layouts: Any, mesh: MeshSpec, activation: Any
) -> list[Predicted]:
    """Predict what `tx.pipeline.value_and_grad` sends along the pipe axis.

    Args:
      pp: the plan's pipeline.
      shapes: the parameters' shapes, as stored.
      layouts: pytree of `Layout` like them.
      mesh: the devices and their axes.
      activation: pytree of the shapes of what one device sends to the next of one microbatch; None
        leaves the permutes out.
    """
    if pp is None or mesh.shape[pp.axis] == 1:
        return []
    predicted = []
    if activation is not None:
        predicted = _predict_permutes(pp, pp.make_schedule(mesh.shape[pp.axis]), activation)
    ends: dict[str, list[int]] = {}
    found = jax.tree_util.tree_flatten_with_path(shapes)[0]
    for (path, leaf), layout in zip(found, jax.tree.leaves(layouts), strict=True):
        if leaf.size and not is_of_blocks(path):
            part = shape_of_part(leaf.shape, layout.view, mesh.shape)
            ends.setdefault(leaf.dtype.name, []).append(math.prod(part))
    sums = [("ends' gradients", dtype, tuple(sizes)) for dtype, sizes in ends.items()]
    for what, dtype, sizes in [*sums, ("loss of the last stage", "float32", (1,))]:
        predicted.append(Predicted(what, "all-reduce", (pp.axis,), dtype, sizes))
    return predicted


def _predict_permutes(pp: PP, schedule: "Schedule", activation: Any) -> list[Predicted]:
    """Predict one permute a tick each way, of the ticks after which anybody receives it."""
    from txcore.parallel.pipeline.ticks import cut_ticks  # by those alone who have stages

    sent: dict[tuple[str, str], list[int]] = {}
    for segment in cut_ticks(schedule):
        for letter in segment.sends:
            for leaf in jax.tree.leaves(activation):
                key = _NAMES[letter], jnp.dtype(leaf.dtype).name
                sent.setdefault(key, []).append(len(segment.ticks) * math.prod(leaf.shape))
    return [
        Predicted(what, "collective-permute", (pp.axis,), dtype, tuple(sizes))
        for (what, dtype), sizes in sent.items()
    ]
