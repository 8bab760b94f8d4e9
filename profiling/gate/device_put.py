"""Describe what `jax.device_put` sends between devices: a reshard that no module shows."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, Sharding

from txcore.profiling.report import Collective

_Spans = tuple[tuple[int, int], ...]  # (start, stop) along each dim


def row_of_move(x: Any, target: Any, source: str) -> Collective | None:
    """Return a row for the bytes that placing `x` as `target` sends between devices, or None.

    Only arrays that are committed to devices count: others, on the host or jax's default device,
    are placed for the first time.

    Args:
      x: the value to place; anything but a jax array is on the host.
      target: a sharding, a layout with one, or a device; anything else moves nothing.
      source: "file.py:12" of the call.

    Returns:
      A row of kind "device_put" and origin "reshard": the payload is the whole array, the wire
      bytes are the most that one device receives.
    """
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer) or not x.committed:
        return None
    sharding = _sharding_of_target(target)
    if sharding is None or sharding == x.sharding:
        return None
    arriving = max(_count_arriving(x, sharding), default=0)
    if not arriving:
        return None
    itemsize = x.nbytes // max(x.size, 1)
    return Collective(
        kind="device_put",
        origin="reshard",
        tags=(),
        axes=_axes_that_differ(x.sharding, sharding),
        group_size=len(x.sharding.device_set | sharding.device_set),
        dtype=x.dtype.name,
        wire_dtype=x.dtype.name,
        payload_bytes=x.nbytes,
        wire_bytes=arriving * itemsize,
        trips=1,
        source=source,
        op_name="jax.device_put",
    )


def _sharding_of_target(target: Any) -> Sharding | None:
    if isinstance(target, jax.Device):
        return jax.sharding.SingleDeviceSharding(target)
    target = getattr(target, "sharding", target)
    return target if isinstance(target, Sharding) else None


def _count_arriving(x: jax.Array, target: Sharding) -> list[int]:
    """Return how many elements each device of `target` receives."""
    held = x.sharding.devices_indices_map(x.shape)
    here = {device: _spans_of_index(index, x.shape) for device, index in held.items()}
    arriving = []
    for device, index in target.devices_indices_map(x.shape).items():
        wanted = _spans_of_index(index, x.shape)
        there = _count_shared(wanted, here[device]) if device in here else 0
        arriving.append(_count_elements(wanted) - there)
    return arriving


def _spans_of_index(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> _Spans:
    slices = index if index is not None else tuple(slice(None) for _ in shape)
    return tuple(s.indices(n)[:2] for s, n in zip(slices, shape, strict=True))


def _count_elements(spans: _Spans) -> int:
    return math.prod(stop - start for start, stop in spans)


def _count_shared(a: _Spans, b: _Spans) -> int:
    both = zip(a, b, strict=True)
    return math.prod(max(0, min(x[1], y[1]) - max(x[0], y[0])) for x, y in both)


def _axes_that_differ(old: Sharding, new: Sharding) -> tuple[str, ...]:
    """Return the axes of the array's mesh along which the two shardings differ."""
    if not isinstance(old, NamedSharding) or not isinstance(new, NamedSharding):
        return ()
    used = [_dims_of_axes(s) for s in (old, new)]
    return tuple(str(a) for a in old.mesh.axis_names if used[0].get(a) != used[1].get(a))


def _dims_of_axes(sharding: NamedSharding) -> dict[Any, int]:
    named = ((dim, axes) for dim, axes in enumerate(sharding.spec) if axes is not None)
    listed = ((dim, axes if isinstance(axes, tuple) else (axes,)) for dim, axes in named)
    return {axis: dim for dim, axes in listed for axis in axes}
