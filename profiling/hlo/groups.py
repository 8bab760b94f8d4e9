"""Replica groups and source-target pairs, in every form that XLA prints."""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from txcore.profiling.hlo.types import HloError

Groups = tuple[tuple[int, ...], ...]

_FORM = re.compile(
    r"(?P<mesh>@?mesh\s*\[(?P<sizes>[^\]]*)\]"
    r"(?:\s*,\s*device_ids=\((?P<ids>[^()]*(?:\([^()]*\)[^()]*)?)\))?\s*\{(?P<axes>[^{}]*)\})"
    r"|(?P<list>\{\s*(?:\{[\d,\s]*\}[,\s]*)*\})"
    r"|(?P<iota>\[[\d,\s]+\]<=\[[\d,\s]+\](?:T\([\d,\s]+\))?)"
)
_IOTA = re.compile(r"\[([\d,\s]+)\]<=\[([\d,\s]+)\](?:T\(([\d,\s]+)\))?")
_DEVICE_IOTA = re.compile(r"\[([\d,\s]+)\](?:T\(([\d,\s]+)\))?")
_AXIS_SIZE = re.compile(r"\s*['\"]?([^'\"=]+?)['\"]?\s*=\s*(\d+)\s*")
_AXIS_REF = re.compile(r"\s*['\"]?([^'\":]+?)['\"]?\s*(?::\((\d+)\)(\d+))?\s*")
_PAIRS = re.compile(r"\{\s*((?:\{\s*\d+\s*,\s*\d+\s*\}[,\s]*)*)\}")
_PAIR = re.compile(r"(\d+)\s*,\s*(\d+)")
MOST_DEVICES = 1 << 20  # a corrupt text must not make us allocate without bound


def canonical(groups: Iterable[Iterable[int]]) -> Groups:
    """Sort the members of each group and the groups, so that equal partitions are equal."""
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def parse_groups(text: str, devices: int) -> Groups:
    """Read the replica groups at the beginning of `text`.

    Args:
      text: `{{0,1},{2,3}}`, `{}` (all in one), `[2,2]<=[4]T(1,0)`, or the mesh form
        `mesh['a'=2,'b'=2] {'a'}` (also unquoted, with `device_ids=`, with sub-axes `a:(1)2`).
      devices: how many devices `{}` stands for.

    Returns:
      The groups, sorted.

    Raises:
      HloError: the text is none of these forms, or contradicts itself.

    Example:
      >>> parse_groups("[2,2]<=[2,2]T(1,0)", 4)
      ((0, 2), (1, 3))
      >>> parse_groups("mesh['data'=2,'model'=2] {'model'}", 4)
      ((0, 1), (2, 3))
    """
    form = _FORM.match(text)
    if form is None:
        raise HloError(f"unknown replica groups {text[:60]!r}")
    if form["list"]:
        return _listed(form["list"], devices)
    if form["iota"]:
        return _iota(form["iota"])
    return _mesh_groups(form["sizes"], form["ids"], form["axes"])


def parse_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Read source-target pairs, `{{0,1},{1,0}}`, at the beginning of `text`.

    Raises:
      HloError: the text is no list of pairs.
    """
    form = _PAIRS.match(text)
    if form is None:
        raise HloError(f"unknown source_target_pairs {text[:60]!r}")
    return tuple(sorted((int(a), int(b)) for a, b in _PAIR.findall(form[1])))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


@functools.lru_cache(maxsize=1024)
def _listed(text: str, devices: int) -> Groups:
    groups = [_numbers(group) for group in re.findall(r"\{([\d,\s]*)\}", text)]
    groups = [group for group in groups if group] or [tuple(range(_bounded(devices)))]
    members = list(itertools.chain.from_iterable(groups))
    if len(set(members)) != len(members):
        raise HloError(f"a device is in two replica groups: {text[:60]!r}")
    return canonical(groups)


def _bounded(devices: int) -> int:
    if not 0 < devices <= MOST_DEVICES:
        raise HloError(f"replica groups of {devices} devices")
    return devices


def _ids(sizes: tuple[int, ...], order: tuple[int, ...] | None) -> np.ndarray:
    if order is not None and sorted(order) != list(range(len(sizes))):
        raise HloError(f"T{order} does not permute the dims {sizes}")
    ids = np.arange(_bounded(math.prod(sizes))).reshape(sizes)
    return (ids if order is None else ids.transpose(order)).reshape(-1)


@functools.lru_cache(maxsize=1024)
def _iota(text: str) -> Groups:
    form = _IOTA.match(text)
    if form is None:
        raise HloError(f"unknown replica groups {text[:60]!r}")
    shape = _numbers(form[1])
    ids = _ids(_numbers(form[2]), _numbers(form[3]) if form[3] else None)
    if len(shape) != 2 or math.prod(shape) != ids.size:
        raise HloError(f"the groups {shape} do not hold {ids.size} devices: {text[:60]!r}")
    return canonical(ids.reshape(shape).tolist())


@functools.lru_cache(maxsize=1024)
def _mesh_groups(sizes: str, ids: str | None, axes: str) -> Groups:
    mesh = _axis_sizes(sizes)
    count = _bounded(math.prod(mesh.values()))
    devices = np.arange(count) if ids is None else _device_ids(ids)
    if sorted(devices.tolist()) != list(range(count)):
        raise HloError(f"device_ids=({(ids or '')[:40]}) are not those of a mesh of {count}")
    wanted = [_AXIS_REF.fullmatch(part) for part in axes.split(",") if part.strip()]
    # Each axis is split in (major, chosen, minor) parts; a whole axis is (1, all, 1).
    parts: list[int] = []
    chosen: list[int] = []
    for name, size in mesh.items():
        refs = [ref for ref in wanted if ref is not None and ref[1] == name]
        for part, is_chosen in _split_axis(name, size, refs):
            if is_chosen:
                chosen.append(len(parts))
            parts.append(part)
    if any(ref is None or ref[1] not in mesh for ref in wanted):
        raise HloError(f"axes {{{axes[:40]}}} are not axes of mesh[{sizes[:40]}]")
    kept = [i for i in range(len(parts)) if i not in chosen]
    grid = devices.reshape(parts).transpose(kept + chosen)
    return canonical(grid.reshape(-1, math.prod(parts[i] for i in chosen)).tolist())


def _axis_sizes(text: str) -> dict[str, int]:
    found = [_AXIS_SIZE.fullmatch(part) for part in text.split(",") if part.strip()]
    if not found or any(axis is None for axis in found):
        raise HloError(f"unknown axes in mesh[{text[:60]}]")
    return {axis[1].strip(): int(axis[2]) for axis in found if axis is not None}


def _device_ids(text: str) -> np.ndarray:
    if form := _DEVICE_IOTA.fullmatch(text.strip()):
        return _ids(_numbers(form[1]), _numbers(form[2]) if form[2] else None)
    return np.array(_numbers(text))


def _split_axis(name: str, size: int, refs: list[re.Match[str]]) -> Iterator[tuple[int, bool]]:
    done = 1  # how much of the axis, from its major end, the parts so far cover
    for major, part in sorted((int(r[2] or 1), int(r[3] or size)) for r in refs):
        if part < 1 or major < done or major % done or size % (major * part):
            raise HloError(f"sub-axis {name}:({major}){part} does not divide an axis of {size}")
        yield major // done, False
        yield part, True
        done = major * part
    yield size // done, False
