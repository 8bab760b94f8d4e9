"""What a plan makes of a model and a mesh, before anything is compiled."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from txcore.layout import Layout, axes_of, mirrored_specs, shape_of_part
from txcore.mesh import MeshSpec
from txcore.optim import Optimizer
from txcore.path_rules import leaf_names
from txcore.plan.description import Description, ParameterRow
from txcore.plan.drawing import Held


def describe(
    plan: Any,
    params: Any,
    mesh: MeshSpec,
    optimizer: Optimizer | None,
    activation: Any,
) -> Description:
    """Return what `Plan.describe` says."""
    shapes = plan.as_stored(jax.eval_shape(lambda tree: tree, params))
    layouts = plan.layouts(shapes, mesh)
    leaves, placed = jax.tree.leaves(shapes), jax.tree.leaves(layouts)
    rows = [
        ParameterRow(
            path,
            leaf.dtype.name,
            leaf.shape,
            layout.stored,
            shape_of_part(leaf.shape, layout.stored, mesh.shape),
            _tell_gradient(plan, path, layout, mesh),
        )
        for path, leaf, layout in zip(leaf_names(shapes), leaves, placed, strict=True)
    ]
    options: dict[str, Any] = {}
    if optimizer is not None:
        options = {"clips": optimizer.clips, "exchanges": optimizer.exchanges}
    schedule = _schedule_of(plan, mesh)
    return Description(
        plan=repr(plan),
        sizes=mesh.shape,
        device=mesh.devices[0].device_kind,
        parameters=tuple(rows),
        collectives=plan.predict(shapes, mesh, activation=activation, **options),
        memory=_count_memory(plan, shapes, layouts, mesh, optimizer, activation),
        schedule="" if schedule is None else str(schedule).splitlines()[0],
        bubble=None if schedule is None else schedule.find_bubble(),
        held=_list_held(plan, shapes, placed, mesh),
    )


def _schedule_of(plan: Any, mesh: MeshSpec) -> Any:
    """Return the pipeline's schedule; None without one, or where one device has all stages."""
    if plan.pipeline is None or mesh.shape[plan.pipeline.axis] == 1:
        return None
    return plan.pipeline.make_schedule(mesh.shape[plan.pipeline.axis])


def _tell_gradient(plan: Any, path: str, layout: Layout, mesh: MeshSpec) -> str:
    """Return what becomes of a parameter's gradient from where it is computed to its update."""
    pp, dp = plan.pipeline, plan.data_parallel
    told = []
    if pp is not None and mesh.shape[pp.axis] > 1 and not path.startswith("blocks/"):
        told.append(f"sum over {pp.axis}")
    if layout.reduced and dp is not None and dp.sync_every > 1:
        told.append(f"stays; parameters are averaged over {', '.join(layout.reduced)}")
    elif layout.reduced:
        name = "adasum" if dp is not None and dp.reduction == "adasum" else "mean"
        told.append(f"{name} over {', '.join(layout.reduced)}")
        if layout.scattered is not None:
            dim, axes = layout.scattered
            told.append(f"a part of dim {dim} along {', '.join(axes)} is kept")
    return "; ".join(told)


def _count_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _count_memory(
    plan: Any,
    shapes: Any,
    layouts: Any,
    mesh: MeshSpec,
    optimizer: Optimizer | None,
    activation: Any,
) -> dict[str, int]:
    leaves, placed = jax.tree.leaves(shapes), jax.tree.leaves(layouts)
    keeps_parts = plan.data_parallel is not None and plan.data_parallel.shard in (
        "gradients",
        "parameters",
    )
    if plan.pipeline is not None and mesh.shape[plan.pipeline.axis] > 1:
        keeps_parts = False  # they add up whole over the microbatches

    def count(trees: Any, specs: Any) -> int:
        pairs = zip(jax.tree.leaves(trees), specs, strict=True)
        return sum(_count_bytes(shape_of_part(x.shape, s, mesh.shape), x.dtype) for x, s in pairs)

    memory = {
        "parameters": count(leaves, [layout.stored for layout in placed]),
        "gradients": count(leaves, [x.gradient if keeps_parts else x.view for x in placed]),
    }
    if optimizer is not None:
        state = jax.eval_shape(optimizer.init, shapes)
        specs = mirrored_specs("optimizer state", state, shapes, layouts)
        memory["optimizer state"] = count(state, jax.tree.leaves(specs, is_leaf=_is_spec))
        if (kept := plan.kept(shapes, mesh, optimizer)) is not None:
            ones = jax.tree.leaves(kept)
            shares = [shape_of_part(one.shape, one.spec, mesh.shape) for one in ones]
            sizes = [
                _count_bytes(share, one.dtype) for share, one in zip(shares, ones, strict=True)
            ]
            memory["communication state"] = sum(sizes)
    if activation is not None and (schedule := _schedule_of(plan, mesh)) is not None:
        from txcore.parallel.pipeline.buffers import plan_buffers  # by those alone who have stages

        buffers = plan_buffers(schedule)
        size = sum(_count_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(activation))
        memory["pipeline's messages"] = size * (buffers.activations.size + buffers.cotangents.size)
        memory["pipeline's inputs"] = size * buffers.stash.size
    return memory


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _list_held(plan: Any, shapes: Any, placed: list[Layout], mesh: MeshSpec) -> tuple[Held, ...]:
    """Return what each device has of the layers, of the split parameters and of the batch."""
    stored = tuple(sorted({axis for layout in placed for axis in axes_of(layout.stored)}))
    pp, tensor = plan.pipeline, plan.tensor_parallel
    rows = () if plan.data_parallel is None else plan.data_parallel.axes
    found = []
    for place in np.ndindex(*mesh.shape.values()):
        at = dict(zip(mesh.shape, map(int, place), strict=True))
        lines = [f"{axis} {at[axis]}" for axis, size in mesh.shape.items() if size > 1]
        if pp is not None and mesh.shape[pp.axis] > 1:
            lines.append(f"layers {_name_layers(pp, shapes, at[pp.axis], mesh.shape[pp.axis])}")
        if tensor is not None and mesh.shape[tensor.axis] > 1:
            lines.append(f"part {at[tensor.axis] + 1} of {mesh.shape[tensor.axis]} of split dims")
        if (share := math.prod(mesh.shape[a] for a in rows)) > 1:
            number = int(np.ravel_multi_index([at[a] for a in rows], [mesh.shape[a] for a in rows]))
            lines.append(f"rows {number + 1} of {share}")
        if plan.context is not None and (n := mesh.shape[plan.context]) > 1:
            lines.append(f"tokens {at[plan.context] + 1} of {n}")
        found.append(Held(tuple(lines), tuple(at[axis] for axis in stored)))
    return tuple(found)


def _name_layers(pp: Any, shapes: Any, stage: int, stages: int) -> str:
    """Return which layers a stage has: "0-3", or of several chunks "0-1, 4-5"."""
    shape = jax.tree.leaves(shapes["blocks"])[0].shape
    layers = shape[0] * (shape[1] if pp.chunks > 1 else 1)
    each = layers // (stages * pp.chunks)
    starts = [(chunk * stages + stage) * each for chunk in range(pp.chunks)]
    return ", ".join(f"{s}-{s + each - 1}" if each > 1 else f"{s}" for s in starts)
