"""The collectives that are measured, each with its expected result in NumPy."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax

from txcore import collectives
from txcore.parallel.gradients.algorithms import (
    ALGORITHMS,
    by_kernels_of,
    is_power_of_two,
    mean_flat,
)

Axes = tuple[str, ...]
# A collective on one device: its flat operand and the axes -> its flat result.
Run = Callable[[jax.Array, Axes], jax.Array]


class Segment(NamedTuple):
    """Describe a run of consecutive elements of a device's result.

    Attributes:
      members: the devices whose elements it is made of, by index in the group.
      start: the first of those elements in each member's operand.
      length: how many there are.
      combine: how the members' elements are combined; those of one member stay as they are.
    """

    members: Sequence[int]
    start: int
    length: int
    combine: Literal["sum", "mean", "max"] = "sum"


# What a device has: its index in the group, the group's size, elements of an operand -> segments.
Expect = Callable[[int, int, int], list[Segment]]


@dataclass(frozen=True)
class Operation:
    """Hold one collective, as nccl-tests counts it.

    Attributes:
      name: of the collective.
      kind: its HLO name, by which `profiling.bandwidth` knows its bus factor.
      run: the collective on one device.
      expect: the result that is expected.
      in_parts: whether S is made of a part for each device, so that its elements are a multiple of
        the group's size and nccl-tests' count is the part's.
      gathers: whether S is the result, and the operand a part of it; else S is the operand.
      algorithm: the one that makes a mean; "" for the collective itself.
      simulated: whether its kernels are run by jax's simulator of TPUs, on CPU devices: that shows
        whether the result is right, and its time says nothing.
    """

    name: str
    kind: str
    run: Run
    expect: Expect
    in_parts: bool = False
    gathers: bool = False
    algorithm: str = ""
    simulated: bool = False

    def count(self, size: int, itemsize: int, n: int) -> int:
        """Return nccl-tests' count for S of at most `size` bytes in a group of n devices; or 0."""
        elements = size // itemsize
        return elements // n if self.in_parts else elements

    def total(self, count: int, n: int) -> int:
        """Return the number of elements of S."""
        return count * n if self.in_parts else count

    def operand(self, count: int, n: int) -> int:
        """Return the number of elements of each device's operand."""
        return count if self.gathers else self.total(count, n)


def _expect_all(combine: Literal["sum", "mean", "max"]) -> Expect:
    return lambda index, n, elements: [Segment(range(n), 0, elements, combine)]


def _expect_gathered(index: int, n: int, elements: int) -> list[Segment]:
    return [Segment((member,), 0, elements) for member in range(n)]


def _expect_scattered(index: int, n: int, elements: int) -> list[Segment]:
    part = elements // n
    return [Segment(range(n), index * part, part)]


def _expect_exchanged(index: int, n: int, elements: int) -> list[Segment]:
    part = elements // n
    return [Segment((member,), index * part, part) for member in range(n)]


def _exchange_parts(x: jax.Array, axes: Axes) -> jax.Array:
    return collectives.all_to_all(x, axes, split_dim=0, concat_dim=0)


OPERATIONS: Mapping[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("psum", "all-reduce", collectives.psum, _expect_all("sum")),
        Operation("pmean", "all-reduce", collectives.pmean, _expect_all("mean")),
        Operation("pmax", "all-reduce", collectives.pmax, _expect_all("max")),
        Operation(
            *("all_gather", "all-gather", collectives.all_gather, _expect_gathered),
            in_parts=True,
            gathers=True,
        ),
        Operation(
            *("reduce_scatter", "reduce-scatter", collectives.reduce_scatter, _expect_scattered),
            in_parts=True,
        ),
        Operation("all_to_all", "all-to-all", _exchange_parts, _expect_exchanged, in_parts=True),
        Operation(
            *("ppermute", "collective-permute", collectives.shift),
            lambda index, n, elements: [Segment(((index - 1) % n,), 0, elements)],
        ),
        Operation(
            *("broadcast", "collective-broadcast", collectives.broadcast),
            lambda index, n, elements: [Segment((0,), 0, elements)],
        ),
    )
}

# What some algorithms need of the axes they average over.
_NEEDS: Mapping[str, tuple[str, Callable[[Sequence[int]], bool]]] = {
    "hierarchical": ("at least two axes, as --axis node,device", lambda sizes: len(sizes) > 1),
    "recursive_doubling": (
        "a number of devices that is a power of two",
        lambda sizes: is_power_of_two(math.prod(sizes)),
    ),
    "remote_dma": ("one axis, a ring, as --axis data", lambda sizes: len(sizes) == 1),
}
_TO_BE_NAMED = "to be named: GPUs without a switch refuse it, and a CPU simulates TPUs for it"


def mean_by(algorithm: str, *, simulated: bool = False) -> Operation:
    """Return the mean that an algorithm of `tx.DP(algorithm=)` makes.

    Args:
      algorithm: its name.
      simulated: whether to simulate TPUs for it, on CPU devices.
    """
    # Their means are one function, whatever the platform: only the bytes that they send differ.
    by = {**ALGORITHMS, **by_kernels_of("cpu")}[algorithm]  # type: ignore[index]
    run: Run = lambda x, axes: mean_flat(by, x, axes, "bench")  # noqa: E731
    return replace(OPERATIONS["pmean"], run=run, algorithm=algorithm, simulated=simulated)


def algorithms_for(sizes: Sequence[int], platform: str) -> dict[str, str]:
    """Return what each algorithm needs and axes of these sizes lack; "" where it can run.

    Args:
      sizes: of the axes.
      platform: "cpu", "gpu" or "tpu".

    Example:
      >>> from txcore.bench import operations
      >>> [name for name, lack in operations.algorithms_for([3], "tpu").items() if lack]
      ['recursive_doubling', 'hierarchical']
    """
    by_kernels = by_kernels_of(platform)
    lacks = dict.fromkeys(map(str, [*ALGORITHMS, *by_kernels]), "")
    for name, (needed, is_met) in _NEEDS.items():
        if name in lacks and not is_met(sizes):
            lacks[name] = needed
    for name in by_kernels:
        if platform != "tpu":
            lacks[name] = lacks[name] or _TO_BE_NAMED
    return lacks
