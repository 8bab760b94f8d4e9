"""Which collective an explicit reshard needs, where that is plain from the two shardings."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from txcore.profiling import meshes
from txcore.profiling.hlo import Groups


@dataclass(frozen=True)
class Wanted:
    """One collective that a reshard needs; `elements` is S as in nccl-tests.

    Where several ways lead to the other sharding, `kind` is "reshard" and nothing else is known.
    """

    kind: str
    axes: tuple[str, ...]
    elements: int
    dtype: str
    groups: Groups


def collectives_of_reshard(aval: Any, target: Any) -> Iterator[Wanted]:
    """Yield the collectives that bring an array to another sharding.

    Axes that leave the spec are gathered; axes that only change their dim are an all-to-all;
    axes that are new cost nothing.

    Args:
      aval: the array's type, with its sharding.
      target: a NamedSharding.
    """
    given = getattr(aval, "sharding", None)
    if given is None or not hasattr(target, "spec") or not given.mesh.shape:
        return
    sizes = meshes.sizes_of(given.mesh)
    before, after = _dim_of(given.spec), _dim_of(target.spec)
    gone = tuple(a for a, _ in sizes if a in before and a not in after)
    moved = tuple(a for a, _ in sizes if a in before and after.get(a, before[a]) != before[a])
    new = any(a not in before for a in after)
    parts = math.prod(size for name, size in sizes if name in before)
    local = aval.size // parts
    if gone and not moved and not new:
        n = meshes.count(sizes, gone)
        yield Wanted("all-gather", gone, n * local, str(aval.dtype), _groups(sizes, gone))
    elif moved and not gone and not new:
        yield Wanted("all-to-all", moved, local, str(aval.dtype), _groups(sizes, moved))
    elif gone or moved:
        yield Wanted("reshard", gone + moved, 0, str(aval.dtype), ())


def _groups(sizes: meshes.Sizes, axes: tuple[str, ...]) -> Groups:
    return meshes.device_groups(sizes, axes)


def _dim_of(spec: Any) -> dict[str, int]:
    parts = [p if isinstance(p, tuple) else (p,) for p in spec]
    return {name: dim for dim, part in enumerate(parts) for name in part if name is not None}
