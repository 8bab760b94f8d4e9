"""Read replica groups and source-target pairs, in every form that XLA prints."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from txcore.profiling.hlo.groups import Dim, Groups, groups_of_block, sort_groups
from txcore.profiling.hlo.types import MOST, HloError, to_int

_MESH = re.compile(
    r"@?mesh\s*\[(?P<sizes>[^\]]*)\]"
    r"(?:\s*,\s*device_ids=\((?P<ids>[^()]*(?:\([^()]*\)[^()]*)?)\))?\s*\{(?P<axes>[^{}]*)\}"
)
_LIST = re.compile(r"\{\s*+(?:\{[\d,\s]*+\}[,\s]*+)*+\}", re.ASCII)
_DIMS = r"\[([\d,\s]+)\]"
_ORDER = r"(?:T\(([\d,\s]+)\))?"
_IOTA = re.compile(rf"{_DIMS}<={_DIMS}{_ORDER}", re.ASCII)
_DEVICE_IOTA = re.compile(_DIMS + _ORDER, re.ASCII)
_DEVICE_LIST = re.compile(r"[\d,\s]*", re.ASCII)
_AXIS_SIZE = re.compile(r"['\"]?([^'\"=]++)['\"]?\s*=\s*(\d+)", re.ASCII)
_AXIS_REF = re.compile(r"['\"]?([^'\":]++)['\"]?\s*(?::\((\d+)\)(\d+))?", re.ASCII)
_PAIRS = re.compile(r"\{\s*+((?:\{\s*+\d++\s*+,\s*+\d++\s*+\}[,\s]*+)*+)\}", re.ASCII)
_NUMBER = re.compile(r"[0-9]+")
_SHORT = 1 << 10  # characters that NumPy does not make faster
_LONG = re.compile(r"[0-9]{10}")  # more digits than any device has

Pairs = tuple[tuple[int, int], ...]
Allow = Callable[[int], bool]  # whether that many devices may be listed that the text does not


def allow_a_million(devices: int) -> bool:
    """Allow to list up to 2^20 devices."""
    return devices <= 1 << 20


def parse_groups(text: str, allow: Allow = allow_a_million) -> Groups:
    """Read the replica groups at the beginning of `text`.

    Args:
      text: `{{0,1},{2,3}}`, `{}` (no group: all are one), `[2,2]<=[4]T(1,0)`, or the mesh form
        `mesh['a'=2,'b'=2] {'a'}` (also unquoted, with `device_ids=`, with sub-axes `a:(1)2`).
      allow: asked for the number of devices where the groups have to be listed and the text does
        not list them.

    Returns:
      The groups.

    Raises:
      HloError: the text is none of these forms, contradicts itself, or may not be listed.

    Example:
      >>> list(parse_groups("[2,2]<=[2,2]T(1,0)"))
      [(0, 2), (1, 3)]
      >>> list(parse_groups("mesh['data'=2,'model'=2] {'model'}"))
      [(0, 1), (2, 3)]
    """
    if listed := _LIST.match(text):
        return _read_listed_groups(listed[0])
    if iota := _IOTA.match(text):
        shape, sizes = _read_sizes(iota[1]), _read_sizes(iota[2])
        if len(shape) != 2 or not 0 < math.prod(shape) == math.prod(sizes):
            raise HloError(f"the groups {text[:60]!r} do not hold {math.prod(sizes)} devices")
        order = _read_sizes(iota[3]) if iota[3] else tuple(range(len(sizes)))
        return _group_reordered_dims(sizes, order, shape[1], allow)
    if mesh := _MESH.match(text):
        return _read_mesh_groups(mesh["sizes"], mesh["ids"], mesh["axes"], allow)
    raise HloError(f"unknown replica groups {text[:60]!r}")


def check_listing(devices: int, allow: Allow) -> None:
    """Check that a number of devices may be listed.

    Raises:
      HloError: it may not.
    """
    if not allow(devices):
        raise HloError(f"groups of {devices} devices in an order that would have to be listed")


def parse_pairs(text: str) -> Pairs:
    """Read source-target pairs, `{{0,1},{1,0}}`, at the beginning of `text`.

    Raises:
      HloError: the text is no list of pairs.
    """
    form = _PAIRS.match(text)
    if form is None or _LONG.search(form[1]):
        raise HloError(f"unknown source_target_pairs {text[:60]!r}")
    ends = iter(_read_integers(form[1]).tolist())
    return tuple(sorted(zip(ends, ends, strict=True)))


def _read_sizes(text: str) -> tuple[int, ...]:
    numbers = tuple(to_int(n) for n in re.findall(r"\d+", text))
    if len(numbers) > 64 or math.prod(numbers) > MOST:
        raise HloError(f"replica groups of more than 10^18 devices: {text[:60]!r}")
    return numbers


_TO_BLANKS = str.maketrans("{},", "   ")


def _read_integers(text: str) -> np.ndarray:
    blank = text.translate(_TO_BLANKS)
    return np.array(blank.split(), np.int64) if len(text) < _SHORT else _read_many_integers(blank)


def _read_many_integers(text: str) -> np.ndarray:
    return np.fromstring(text, np.int64, sep=" ") if text.strip() else np.zeros(0, np.int64)


def _read_listed_groups(text: str) -> Groups:
    if _LONG.search(text):
        raise HloError(f"replica groups of more than 10^9 devices: {text[:60]!r}")
    if len(text) < _SHORT:
        groups = [list(map(int, _NUMBER.findall(part))) for part in text[1:-1].split("}")]
        if len({n for group in groups for n in group}) != sum(map(len, groups)):
            raise HloError(f"a device is in two replica groups: {text[:60]!r}")
        return sort_groups(group for group in groups if group)
    members = _read_integers(text)
    if len(np.unique(members)) != len(members):
        raise HloError(f"a device is in two replica groups: {text[:60]!r}")
    # Each group's members are those whose digits begin between its brace and the next one.
    codes = np.frombuffer(text.encode(), np.uint8)
    is_digit = (codes >= ord("0")) & (codes <= ord("9"))
    begins = np.flatnonzero(is_digit & ~np.concatenate(([False], is_digit[:-1])))
    braces = np.flatnonzero(codes == ord("{"))[1:]
    ends = np.searchsorted(begins, braces)[1:].tolist()
    listed, numbers = members.tolist(), [0, *ends, len(members)]
    return sort_groups(listed[a:b] for a, b in itertools.pairwise(numbers) if a < b)


def _group_reordered_dims(
    sizes: Sequence[int], order: Sequence[int], group: int, allow: Allow
) -> Groups:
    """Return the groups of `group` devices that follow each other in a block's reordered dims."""
    if sorted(order) != list(range(len(sizes))):
        raise HloError(f"T{tuple(order)} does not permute the dims {tuple(sizes)}")
    parts: list[list[Dim]] = [[] for _ in sizes]
    left = group  # what of a group the dims so far, from the minor end, do not give
    for dim in reversed(order):
        together = math.gcd(sizes[dim], left)
        if left > 1 and together != min(sizes[dim], left):  # a group ends within a row of it
            check_listing(math.prod(sizes), allow)
            ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
            return sort_groups(ids.reshape(-1, group).tolist())
        parts[dim] = [(sizes[dim] // together, False), (together, True)]
        left //= together
    return groups_of_block(itertools.chain.from_iterable(parts))


def _read_mesh_groups(sizes: str, ids: str | None, axes: str, allow: Allow) -> Groups:
    mesh = _read_axis_sizes(sizes)
    # Each axis is split in (major, chosen, minor) parts; a whole axis is (1, all, 1).
    chosen: dict[str, list[tuple[int, int]]] = {name: [] for name in mesh}
    for part in filter(None, map(str.strip, axes.split(","))):
        ref = _AXIS_REF.fullmatch(part)
        name = ref[1].strip() if ref else ""
        if ref is None or name not in mesh:
            raise HloError(f"axes {{{axes[:40]}}} are not axes of mesh[{sizes[:40]}]")
        whole = (to_int(ref[2]), to_int(ref[3])) if ref[2] else (1, mesh[name])
        chosen[name].append(whole)
    dims = [dim for name, size in mesh.items() for dim in _split_axis(name, size, chosen[name])]
    if ids is None:
        return groups_of_block(dims)
    # The mesh's devices are in another order than that of their numbers.
    count = math.prod(mesh.values())
    check_listing(count, allow)
    devices = _read_device_ids(ids, count)
    order = sorted(range(len(dims)), key=lambda i: dims[i][1])
    group = math.prod(size for size, together in dims if together)
    grid = devices.reshape([size for size, _ in dims]).transpose(order)
    return sort_groups(grid.reshape(-1, group).tolist())


def _read_axis_sizes(text: str) -> dict[str, int]:
    found = [_AXIS_SIZE.fullmatch(part.strip()) for part in text.split(",") if part.strip()]
    if not 0 < len(found) <= 32 or any(axis is None for axis in found):
        raise HloError(f"unknown axes in mesh[{text[:60]}]")
    mesh = {axis[1].strip(): to_int(axis[2]) for axis in found if axis is not None}
    if not 0 < math.prod(mesh.values()) <= MOST:
        raise HloError(f"mesh[{text[:60]}] of no number of devices")
    return mesh


def _read_device_ids(text: str, devices: int) -> np.ndarray:
    if form := _DEVICE_IOTA.fullmatch(text.strip()):
        sizes = _read_sizes(form[1])
        order = _read_sizes(form[2]) if form[2] else tuple(range(len(sizes)))
        if math.prod(sizes) == devices and sorted(order) == list(range(len(sizes))):
            return np.arange(devices).reshape(sizes).transpose(order).reshape(-1)
    elif _DEVICE_LIST.fullmatch(text) and not _LONG.search(text):
        ids = _read_integers(text)
        if np.array_equal(np.sort(ids), np.arange(devices)):
            return ids
    raise HloError(f"device_ids=({text[:40]}) are not those of a mesh of {devices}")


def _split_axis(name: str, size: int, chosen: list[tuple[int, int]]) -> Iterator[Dim]:
    done = 1  # how much of the axis, from its major end, the parts so far cover
    for major, part in sorted(chosen):
        if part < 1 or major < done or major % done or size % (major * part):
            raise HloError(f"sub-axis {name}:({major}){part} does not divide an axis of {size}")
        yield major // done, False
        yield part, True
        done = major * part
    yield size // done, False
