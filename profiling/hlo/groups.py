"""Groups of devices: what a collective runs within.

Groups that cut a block of devices along its dims, as those of a mesh do, are kept as these dims and
never listed: a line of 40 characters may mean a billion devices.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

Dim = tuple[int, bool]  # a size, and whether the devices along it are in one group


@dataclass(frozen=True, slots=True)
class Groups(Sequence[tuple[int, ...]]):
    """Groups of devices, sorted; two equal ones compare equal, however they were printed.

    Attributes:
      dims: the dims of a block, major to minor, where the groups hold each of its devices once;
        neighbours differ in whether they are together, and none has size 1. Else None.
      listed: the members of each group where `dims` is None.
    """

    dims: tuple[Dim, ...] | None = None
    listed: tuple[tuple[int, ...], ...] = ()

    @property
    def size(self) -> int:
        """Return the devices in the largest group, 0 where there is no group."""
        if self.dims is None:
            return max(map(len, self.listed), default=0)
        return math.prod(size for size, together in self.dims if together)

    @property
    def devices(self) -> int:
        """Return the devices in all groups."""
        if self.dims is None:
            return sum(map(len, self.listed))
        return math.prod(size for size, _ in self.dims)

    @property
    def last(self) -> int:
        """Return the largest number of a device, -1 where there is none."""
        return max(map(max, self.listed), default=-1) if self.dims is None else self.devices - 1

    def first_holds(self, device: int) -> bool:
        """Tell whether a device is in the first group, which may be too long to be listed."""
        if self.dims is None:
            return device in self.listed[0]
        for size, together in reversed(self.dims):
            device, place = divmod(device, size)
            if place and not together:
                return False
        return device == 0

    def __len__(self) -> int:
        return len(self.listed) if self.dims is None else self.devices // self.size

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[int, ...], ...]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
        if self.dims is None:
            return self.listed[index]
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        first, stride, members = index % len(self), 1, [0]
        start = 0
        for size, together in reversed(self.dims):
            if together:
                members = [along * stride + i for along in range(size) for i in members]
            else:
                first, place = divmod(first, size)
                start += place * stride
            stride *= size
        return tuple(start + member for member in members)


NO_GROUPS = Groups()


def groups_of_block(dims: Iterable[Dim]) -> Groups:
    """Return the groups that a block of devices falls into: those along the dims marked True.

    Example:
      >>> rows, columns = [(2, False), (2, True)], [(2, True), (2, False)]
      >>> list(groups_of_block(rows)), list(groups_of_block(columns))
      ([(0, 1), (2, 3)], [(0, 2), (1, 3)])
    """
    merged: list[Dim] = []
    for size, together in dims:
        if size == 1:
            continue
        if merged and merged[-1][1] == together:
            size *= merged.pop()[0]
        merged.append((size, together))
    return Groups(tuple(merged))


def fold_groups(first: Groups, second: Groups) -> Groups | None:
    """Return the groups of one sum that does the work of two, one after the other.

    Returns:
      The groups that hold every device which two steps reach; None where the two are not those of
      different axes of one block.

    Example:
      >>> rows = groups_of_block([(2, False), (2, True)])
      >>> columns = groups_of_block([(2, True), (2, False)])
      >>> list(fold_groups(rows, columns))
      [(0, 1, 2, 3)]
    """
    if first.dims is None or second.dims is None or first.devices != second.devices:
        return None
    ours, theirs, folded = [*first.dims], [*second.dims], list[Dim]()
    while ours and theirs:
        (size, together), (other, also) = ours.pop(), theirs.pop()
        shared = min(size, other)
        if size % shared or other % shared or (together and also):
            return None
        folded.append((shared, together or also))
        ours += [(size // shared, together)] if size > shared else []
        theirs += [(other // shared, also)] if other > shared else []
    return groups_of_block(reversed(folded))


def sort_groups(groups: Iterable[Iterable[int]]) -> Groups:
    """Sort the members of each group and the groups; keep the dims of a block if they are one.

    Example:
      >>> sort_groups([[3, 2], [1, 0]]) == groups_of_block([(2, False), (2, True)])
      True
    """
    listed = tuple(sorted(tuple(sorted(group)) for group in groups))
    sizes = {len(group) for group in listed}
    if len(sizes) != 1 or listed[0][0] != 0:
        return Groups(None, listed)
    regular = _guess_block(listed[0], sum(map(len, listed)))
    if regular is None or not np.array_equal(_list_rows(regular.dims or ()), np.array(listed)):
        return Groups(None, listed)
    return regular


def _list_rows(dims: Sequence[Dim]) -> np.ndarray:
    """List the groups of a block, one a row."""
    order = sorted(range(len(dims)), key=lambda i: dims[i][1])
    ids = np.arange(math.prod(size for size, _ in dims)).reshape([size for size, _ in dims])
    together = math.prod(size for size, is_one in dims if is_one)
    return ids.transpose(order).reshape(-1, together)


def _guess_block(first: Sequence[int], devices: int) -> Groups | None:
    """Return the block whose first group is this one, or None where there is none."""
    dims: list[Dim] = []
    unit = 1  # how many devices the dims so far cover
    while len(first) > 1:
        apart = first[1]
        if apart % unit:
            return None
        run = next((i for i, device in enumerate(first) if device != i * apart), len(first))
        if len(first) % run:
            return None
        dims += [(apart // unit, False), (run, True)]
        unit, first = apart * run, first[::run]
    if devices % unit:
        return None
    return groups_of_block([(devices // unit, False), *reversed(dims)])
