"""Meshes of devices with named axes, and the groups of devices along them.

A *rank* is a process. A device has a *position* in the mesh, counted in row-major order, and an
*index* along each of its axes.
"""

import html
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_MOST_SHOWN = 16  # positions along an axis, in a notebook


@dataclass(frozen=True)
class DeviceGroup:
    """Describe the devices along one axis that share every other index, seen from one of them.

    Attributes:
      axis: the mesh axis.
      size: the number of devices along it.
      index: of this device along the axis.
      members: their positions in the mesh, row-major: the axis's replica group.
      previous: position of the left neighbour; the ring is closed.
      next: position of the right neighbour.
    """

    axis: str
    size: int
    index: int
    members: tuple[int, ...]
    previous: int
    next: int

    @property
    def rank(self) -> int:
        """The old name of `index`."""
        _warn_renamed("DeviceGroup.rank", "DeviceGroup.index")
        return self.index


class MeshSpec:
    """Arrange devices in a grid whose axes have names.

    Args:
      devices: the devices in row-major order; None takes all of them, in the order that
        jax recommends for the platform's network.
      axes: names of the axes, each once.
      shape: size of each axis; None gives a single axis all devices.

    Raises:
      ValueError: no axes, a repeated name, or sizes that do not multiply to the number of
        devices.

    Example:
      >>> mesh = tx.MeshSpec(devices=jax.devices()[:4], axes=("data", "model"), shape=(2, 2))
      >>> mesh.shape
      {'data': 2, 'model': 2}
      >>> mesh.group("model", jax.devices()[2])
      DeviceGroup(axis='model', size=2, index=0, members=(2, 3), previous=3, next=3)
    """

    def __init__(
        self,
        devices: Sequence[jax.Device] | None = None,
        axes: Sequence[str] = ("data",),
        shape: int | Sequence[int] | None = None,
    ) -> None:
        names = _check_names(axes)
        if devices is not None and len(set(devices)) != len(devices):
            raise ValueError(f"MeshSpec needs each device once, got devices={list(devices)}")
        count = jax.device_count() if devices is None else len(devices)
        sizes = _check_shape(shape, names, count)
        types = (AxisType.Explicit,) * len(names)  # a mismatched spec is an error, no reshard
        if devices is None:
            self.mesh = jax.make_mesh(sizes, names, axis_types=types)
        else:
            self.mesh = Mesh(
                np.array(devices, dtype=object).reshape(sizes), names, axis_types=types
            )

    def __repr__(self) -> str:
        axes, shape = tuple(self.shape), tuple(self.shape.values())
        return f"MeshSpec(axes={axes}, shape={shape}, {self.size} x {self.devices[0].device_kind})"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(chr(10).join([repr(self), '', *self._draw_positions()]))}</pre>"

    def _draw_positions(self) -> list[str]:
        """Write the devices' positions as a grid: the last axis to the right, the others down."""
        *rows, column = self.shape
        wide = self.shape[column]
        shown = min(wide, _MOST_SHOWN)
        head = [f"{column} {i}" for i in range(shown)] + ["..."] * (shown < wide)
        lines = [["", *head]]
        for row in list(np.ndindex(*self.mesh.devices.shape[:-1]))[:_MOST_SHOWN]:
            name = ", ".join(f"{axis} {i}" for axis, i in zip(rows, row, strict=True))
            first = int(np.ravel_multi_index((*row, 0), self.mesh.devices.shape))
            lines.append([name, *(str(first + i) for i in range(shown))])
        if self.size > wide * _MOST_SHOWN:
            lines.append(["..."])
        width = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
        padded = ([c.ljust(w) for c, w in zip(line, width, strict=False)] for line in lines)
        return ["  ".join(line).rstrip() for line in padded]

    @property
    def shape(self) -> dict[str, int]:
        """Size of each axis by name."""
        return dict(self.mesh.shape)

    @property
    def size(self) -> int:
        """The number of devices."""
        return self.mesh.size

    @property
    def devices(self) -> list[jax.Device]:
        """The devices, row-major: each at its position."""
        return list(self.mesh.devices.flat)

    def sharding(self, *spec: str | tuple[str, ...] | None) -> NamedSharding:
        """Return the sharding of an array over this mesh: an axis name or None for each dim.

        Example:
          >>> mesh = tx.MeshSpec(devices=jax.devices()[:2], axes=("data",))
          >>> jax.device_put(np.arange(4.0), mesh.sharding("data")).sharding.spec[0]
          'data'
        """
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def position(self, device: jax.Device | None = None) -> int:
        """Return a device's position (by default, of this process's first device here).

        Raises:
          ValueError: the device, or any of this process, is not in the mesh.
        """
        devices = self.devices
        if device is None:
            mine = jax.process_index()
            device = next((d for d in devices if d.process_index == mine), None)
            if device is None:
                raise ValueError(f"process {mine} has no device in {self!r}: name a device")
        if device not in devices:
            raise ValueError(f"{device} is not in {self!r}")
        return devices.index(device)

    def rank(self, device: jax.Device | None = None) -> int:
        """Return `position(device)`, by its old name."""
        _warn_renamed("MeshSpec.rank", "MeshSpec.position")
        return self.position(device)

    def coordinates(self, device: jax.Device | None = None) -> dict[str, int]:
        """Return a device's index along each axis (by default, this process's first device)."""
        place = np.unravel_index(self.position(device), self.mesh.devices.shape)
        return {a: int(i) for a, i in zip(self.mesh.axis_names, place, strict=True)}

    def group(self, axis: str, device: jax.Device | None = None) -> DeviceGroup:
        """Return the group of devices along `axis` that a device belongs to.

        Raises:
          ValueError: the mesh has no such axis, or the device is not in it.
        """
        self.check_axis(axis)
        index, position = self.coordinates(device)[axis], self.position(device)
        members = next(group for group in self.replica_groups(axis) if position in group)
        size = len(members)
        left, right = members[(index - 1) % size], members[(index + 1) % size]
        return DeviceGroup(axis, size, index, members, left, right)

    def replica_groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """Return the positions of the devices that communicate along `axis`, group by group."""
        self.check_axis(axis)
        positions = np.arange(self.size).reshape(self.mesh.devices.shape)
        last = np.moveaxis(positions, self.mesh.axis_names.index(axis), -1)
        return tuple(tuple(map(int, row)) for row in last.reshape(-1, self.shape[axis]))

    def check_axis(self, axis: str, needed_by: str = "") -> None:
        """Refuse an axis that this mesh does not have."""
        if axis not in self.shape:
            names = ", ".join(map(repr, self.shape))
            needs = f"{needed_by} needs" if needed_by else "need"
            raise ValueError(
                f"{needs} mesh axis {axis!r}, but the mesh's axes are {names}: use one of them, "
                f"or name the axis in MeshSpec(axes=...)"
            )


def __getattr__(name: str) -> object:
    if name == "ProcessGroup":
        _warn_renamed("ProcessGroup", "DeviceGroup")
        return DeviceGroup
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _warn_renamed(old: str, new: str) -> None:
    text = f"{old} is now {new}, since a rank is a process: use that; {old} goes in version 0.3"
    warnings.warn(text, DeprecationWarning, stacklevel=3)


def _check_names(axes: Sequence[str]) -> tuple[str, ...]:
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    if not names or not all(isinstance(a, str) and a for a in names):
        raise ValueError(f"MeshSpec needs axes= at least one axis name, got {axes!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"MeshSpec needs each axis name once, got axes={axes!r}")
    return names


def _check_shape(
    shape: int | Sequence[int] | None, names: tuple[str, ...], count: int
) -> tuple[int, ...]:
    if count == 0:
        raise ValueError("MeshSpec needs at least one device, got devices=[]")
    if shape is None:
        if len(names) > 1:
            raise ValueError(
                f"MeshSpec needs shape= one size for each of the axes {names}, whose product is "
                f"the number of devices, {count}"
            )
        return (count,)
    sizes = (shape,) if isinstance(shape, int) else tuple(int(s) for s in shape)
    if len(sizes) != len(names) or min(sizes) < 1:
        raise ValueError(
            f"MeshSpec needs shape= one positive size for each of the axes {names}, got {shape!r}"
        )
    if math.prod(sizes) != count:
        raise ValueError(
            f"MeshSpec needs shape= sizes whose product is the number of devices, {count}, got "
            f"{shape!r} = {math.prod(sizes)}: change shape=, or pass devices= a list that long"
        )
    return sizes
