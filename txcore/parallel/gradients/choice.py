"""Which algorithm exchanges which gradients: what the caller says, or else the fastest known."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import jax

from txcore.kernels.ring import check_platform
from txcore.parallel.gradients.algorithms import (
    ALGORITHMS,
    Algorithm,
    Name,
    by_kernels_of,
    is_power_of_two,
)
from txcore.parallel.gradients.buckets import Bucket, Buckets, bucket_layout
from txcore.parallel.gradients.measured import find_measured
from txcore.parallel.predicted import Predicted

MIB = 1 << 20


@dataclass(frozen=True)
class Faster:
    """State where an algorithm is faster than the plain one.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      over_processes: whether the run is one of several processes.
      most_devices: that exchange.
      least_bytes: of one bucket.
      name: the algorithm.
    """

    platform: str
    over_processes: bool
    most_devices: int
    least_bytes: int
    name: Name


# Measured on two cores, in one process and in several (benchmarks/test_exchange_bench.py). A large
# all-reduce of XLA's writes into memory that is new to it; these go piece by piece in one buffer.
# In one process that counts from 32 MiB on: MNIST's step with 4.6 MiB of gradients took a ninth
# longer with it on 2 devices, and twice as long on 4. On GPU and TPU nothing is known to be faster
# than one all-reduce.
FASTER = (
    Faster("cpu", True, 2, 4 * MIB, "recursive_doubling"),
    Faster("cpu", True, 1 << 30, 4 * MIB, "ring"),
    Faster("cpu", False, 2, 32 * MIB, "recursive_doubling"),
)


# From how many leaves on one copy into a flat array is faster than what XLA combines: over two
# processes an all-reduce of 200 leaves is 200 exchanges of gloo's, 8 to 20 times slower than one.
_WORTH_PACKING = {"cpu": 16}


def fastest(platform: str, nbytes: int, sizes: Mapping[str, int], dtype: str = "float32") -> Name:
    """Return the fastest algorithm known for so many bytes over axes of these sizes.

    What `txcore bench --record` has measured on this machine comes first.
    """
    found = find_measured(platform, nbytes, dtype, sizes)
    for name in ALGORITHMS:
        if name == found and _can_run(name, sizes) and _has_levels(name, sizes):
            return name
    devices, over_processes = math.prod(sizes.values()), jax.process_count() > 1
    for row in FASTER:
        there = (row.platform, row.over_processes) == (platform, over_processes)
        if there and devices <= row.most_devices and nbytes >= row.least_bytes:
            return row.name
    return "plain"


def _can_run(name: Name, sizes: Mapping[str, int]) -> bool:
    return name != "recursive_doubling" or is_power_of_two(math.prod(sizes.values()))


def _has_levels(name: Name, sizes: Mapping[str, int]) -> bool:
    return name != "hierarchical" or len(sizes) > 1


def check_algorithm(op: str, algorithm: Any, axes: tuple[str, ...] | None) -> None:
    """Refuse what is no algorithm, or needs other axes, where these are known.

    Raises:
      ValueError: with the alternative.
    """
    if algorithm is None:
        return
    if algorithm not in get_args(Name):
        names = ", ".join(map(repr, get_args(Name)))
        raise ValueError(f"{op} needs algorithm= {names} or None, got {algorithm!r}")
    if algorithm == "hierarchical" and axes is not None and len(axes) < 2:
        raise ValueError(
            f"{op} needs two axes or more with algorithm='hierarchical', the nearest devices along "
            f"the last, got {axes}: write axis=('node', 'device') for a mesh of those axes, or "
            "algorithm='reduce_scatter_all_gather'"
        )


def check_not_compressed(op: str, algorithm: Any, compression: Any) -> None:
    """Refuse an algorithm for what a compression exchanges.

    Raises:
      ValueError: there are both.
    """
    if algorithm is not None and compression is not None:
        raise ValueError(
            f"{op} needs algorithm=None with compression={compression!r}, got {algorithm!r}: a "
            "compression has an exchange of its own; leave one of them out"
        )


def plan_exchange(
    tree: Any,
    layouts: Any,
    *,
    sizes: Mapping[str, int],
    platform: str,
    buckets: Buckets | None,
    algorithm: Name | None,
) -> list[tuple[Bucket, Algorithm]]:
    """Choose the buckets of gradients and an algorithm for each.

    Args:
      tree: pytree of gradients of one device, arrays or shapes.
      layouts: pytree of `Layout` like it, of axes of more than one device.
      sizes: of the axes.
      platform: "cpu", "gpu" or "tpu".
      buckets: their sizes. None leaves out those that a plain all-reduce exchanges, which XLA
        combines as it likes (on CPU those of few leaves), and without an algorithm shards too;
        others are as `Buckets()` says.
      algorithm: of all buckets; None for the fastest known for each.

    Returns:
      The buckets in order. The leaves in none of them are averaged by plain collectives.

    Raises:
      ValueError: the algorithm needs another number of devices.
    """
    if buckets is None and algorithm == "plain":
        return []
    by_kernels = by_kernels_of(platform)
    if algorithm in by_kernels:
        check_platform(f"algorithm={algorithm!r}", platform)
    chosen = []
    for bucket in bucket_layout(tree, layouts, buckets or Buckets()):
        if buckets is None and algorithm is None and bucket.scattered:
            continue  # a shard may be reduced by itself, before others are there
        steps = split_steps(bucket, sizes)
        name = algorithm or fastest(platform, bucket.nbytes, steps[0], bucket.dtype)
        if not all(_can_run(name, step) for step in steps if step):
            _refuse_devices(bucket, sizes)
        if name in by_kernels and any(len(step) > 1 for step in steps):
            _refuse_several_axes(name, bucket)
        is_packed = len(bucket.leaves) >= _WORTH_PACKING.get(platform, math.inf)
        if buckets is not None or name != "plain" or is_packed:
            chosen.append((bucket, {**ALGORITHMS, **by_kernels}[name]))
    return chosen


def split_steps(bucket: Bucket, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Return the axes, with their sizes, over which a bucket is averaged one after the other."""
    parts = {axis: sizes[axis] for axis in bucket.scattered}
    others = {axis: sizes[axis] for axis in bucket.axes if axis not in parts}
    return [step for step in (parts, others) if step]


def _refuse_devices(bucket: Bucket, sizes: Mapping[str, int]) -> None:
    over = ", ".join(f"{axis!r} of {sizes[axis]}" for axis in bucket.axes)
    raise ValueError(
        "algorithm='recursive_doubling' needs a number of devices that is a power of two, got the "
        f"axes {over}: write algorithm='chunked', or None for the fastest that can run"
    )


def _refuse_several_axes(name: Name, bucket: Bucket) -> None:
    raise ValueError(
        f"algorithm={name!r} needs one axis of more than one device, got "
        f"{bucket.axes}: shard the state over one of them, or write algorithm=None"
    )


def predict_bucket(
    bucket: Bucket,
    algorithm: Algorithm,
    sizes: Mapping[str, int],
    *,
    early: bool = False,
    together: bool = True,
) -> list[Predicted]:
    """Predict what the exchange of a bucket sends.

    Args:
      bucket: of the gradients.
      algorithm: by which it is averaged.
      sizes: of the axes.
      early: whether a loop over microbatches scatters its gradients in each trip.
      together: whether its gradients are scattered together, and not each by itself.
    """
    elements = sum(bucket.elements)
    sent: list[Predicted] = []
    for step in split_steps(bucket, sizes):
        if bucket.scattered and not sent:
            for own in [elements] if together else bucket.elements:
                lines = algorithm.sends_blocks(own, bucket.dtype, step)
                sent += [replace(line, per_microbatch=early) for line in lines]
            elements //= math.prod(step.values())
        else:
            sent += algorithm.sends_flat(elements, bucket.dtype, step)
    return sent
