"""What a plan makes a training step communicate: all of it together."""

from typing import Any

import jax

from txcore.layout import gradient_specs, split_axes
from txcore.mesh import MeshSpec
from txcore.optim.optimizer import Exchanges
from txcore.parallel.predicted import Predicted
from txcore.plan.predict import predict_adasum, predict_average, predict_norms
from txcore.plan.predict_buckets import predict_exchange
from txcore.plan.predict_pipeline import predict_pipeline
from txcore.plan.predict_shards import predict_optimizer


def predict_step(
    plan: Any,
    params: Any,
    mesh: MeshSpec,
    *,
    clips: bool,
    skips: bool,
    exchanges: Exchanges | None,
    activation: Any,
) -> tuple[Predicted, ...]:
    """Return what `Plan.predict` says."""
    shapes = jax.eval_shape(lambda tree: tree, params)
    layouts = plan.layouts(shapes, mesh)
    pairs = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(layouts), strict=True))
    rounds, differing = plan.rounds(mesh), set(split_axes(layouts))
    dp = plan.data_parallel
    if rounds is not None:
        predicted = predict_average(pairs, mesh, rounds)
        differing.update(rounds.axes)
    elif dp is not None and dp.reduction == "adasum":
        predicted = predict_adasum(pairs, mesh)
    else:
        predicted = predict_exchange(shapes, layouts, mesh, dp)
    predicted += predict_pipeline(plan.pipeline, shapes, layouts, mesh, activation)
    if clips:
        predicted += predict_norms(pairs)
    if skips and (axes := tuple(sorted(differing))):
        predicted.append(Predicted("finite gradients", "all-reduce", axes, "int32", (1,)))
    if exchanges is not None:
        predicted += predict_optimizer(exchanges(shapes, gradient_specs(layouts), mesh.shape))
    return tuple(predicted)
