"""Mesh axes from groups of devices: against all sets of axes, and on a mesh of many axes."""

import itertools
import math

import numpy as np
import pytest

from txcore.profiling import meshes
from txcore.profiling.hlo import sort_groups


def list_groups(sizes, axes):
    """Return the groups along some axes by NumPy's own indices."""
    shape = [size for _, size in sizes]
    groups = {}
    for device in range(math.prod(shape)):
        place = np.unravel_index(device, shape)
        kept = tuple(int(i) for (name, _), i in zip(sizes, place, strict=True) if name not in axes)
        groups.setdefault(kept, []).append(device)
    return sort_groups(groups.values())


@pytest.mark.parametrize("shape", [(2,), (1,), (2, 3), (3, 1, 2), (2, 2, 2), (4, 1, 3, 2)])
def test_every_set_of_axes_is_found_again(shape):
    sizes = tuple(zip("abcd", shape, strict=False))
    names = [name for name, size in sizes if size > 1]
    for number in range(len(names) + 1):
        for axes in itertools.combinations(names, number):
            assert meshes.axes_of_groups(list_groups(sizes, axes), sizes) == axes


@pytest.mark.parametrize(
    "groups",
    [
        [(0, 1), (2, 3), (4, 5)],  # of fewer devices than the mesh has
        [(0, 1, 2, 3), (4, 5), (6, 7)],  # of different sizes
        [(0, 3), (1, 2), (4, 7), (5, 6)],  # along no axis
        [(0, 1), (2, 3), (4, 6), (5, 7)],  # along an axis for some devices alone
        [],
    ],
)
def test_groups_of_no_axes_have_none(groups):
    sizes = (("a", 2), ("b", 2), ("c", 2))
    assert meshes.axes_of_groups(sort_groups(groups), sizes) is None


def test_a_mesh_of_many_axes_takes_no_set_after_the_other(monkeypatch):
    """Sixteen axes have 65,536 sets: one of them is looked at."""
    sizes = tuple((f"a{i}", 2) for i in range(16))
    wanted = tuple(name for name, _ in sizes[1::2])
    groups = meshes.device_groups(sizes, wanted)
    asked = []
    real = meshes.device_groups

    def note(*given):
        asked.append(given)
        return real(*given)

    monkeypatch.setattr(meshes, "device_groups", note)
    assert meshes.axes_of_groups(groups, sizes) == wanted
    assert len(asked) == 1
