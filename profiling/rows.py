"""Turn a compiled collective, and what the traced program declares like it, into a report's row."""

from collections.abc import Sequence

import jax.numpy as jnp

from txcore.profiling import meshes, source
from txcore.profiling.hlo import Op, Shape
from txcore.profiling.jaxpr import Declared
from txcore.profiling.origin import UNEXPLAINED, origin_of
from txcore.profiling.report import Collective


def row_of(op: Op, declared: Sequence[Declared], sizes: Sequence[meshes.Sizes]) -> Collective:
    """Describe one compiled collective.

    Args:
      op: the collective.
      declared: those of the same kind and groups of devices that the traced program declares.
      sizes: the meshes whose axes may name its groups; the first that fits does.

    Returns:
      Its row, with the origin that its own line gives it.
    """
    origin, note = origin_of(op)
    axes, group_size = _axes(op, sizes)
    meant = [d for d in declared if d.tag in (op.tags or (None,))]
    if origin == "txcore" and _is_merged_with_autodiff(op, declared, meant):
        origin, note = "autodiff", "merged with a collective that autodiff made, without a tag"
    scale = group_size if op.kind == "all-gather" else 1
    dtypes = [_dtype(shape, scale, meant) for shape in op.operands]
    sources = {d.source for d in meant}
    return Collective(
        kind=op.kind,
        origin=origin,
        tags=op.tags,
        axes=axes,
        group_size=group_size,
        dtype=",".join(dict.fromkeys(dtypes)),
        wire_dtype=",".join(dict.fromkeys(shape.dtype for shape in op.operands)),
        payload_bytes=scale * sum(map(_bytes, op.operands, dtypes)),
        wire_bytes=_wire_bytes(op, group_size),
        trips=op.trips.count,
        source=sources.pop() if len(sources) == 1 else source.shorten(op.frames),
        op_name=op.op_name,
        explained=origin not in UNEXPLAINED,
        trips_known=op.trips.known,
        note=note,
    )


def _is_merged_with_autodiff(
    op: Op, declared: Sequence[Declared], meant: Sequence[Declared]
) -> bool:
    """Tell whether more was merged into a tagged op than its tags declare, autodiff's too."""
    more = op.elements > sum(d.elements for d in meant)
    return more and any(d.autodiff for d in declared)


def _axes(op: Op, sizes: Sequence[meshes.Sizes]) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes that the devices of an op form groups along, and the groups' size."""
    for mesh in sizes:
        if op.kind == "collective-permute":
            axes = meshes.axes_of_pairs(op.pairs, mesh)
        else:
            axes = meshes.axes_of_groups(op.groups, mesh)
        if axes is not None:
            return axes, op.group_size or meshes.count(mesh, axes)
    return (), op.group_size


def _dtype(shape: Shape, scale: int, meant: Sequence[Declared]) -> str:
    """Return the dtype that was declared for an operand, by its size where several may be meant."""
    same_size = {d.dtype for d in meant if d.elements == scale * shape.elements}
    dtypes = same_size or {d.dtype for d in meant}
    return dtypes.pop() if len(dtypes) == 1 else shape.dtype


def _bytes(shape: Shape, dtype: str) -> int:
    return shape.bytes if dtype == shape.dtype else shape.elements * jnp.dtype(dtype).itemsize


def _wire_bytes(op: Op, n: int) -> int:
    if op.kind == "all-reduce":
        return -(-2 * (n - 1) * op.bytes // n)
    if op.kind in ("all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return -(-(n - 1) * op.bytes // n)
    return op.bytes
