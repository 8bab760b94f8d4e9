"""Run one collective at one size: check its results, time it, and gather what the ranks saw."""

import contextlib
import functools
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from txcore import collectives
from txcore.bench.check import Draw, count_wrong, draw_operand
from txcore.bench.operations import Axes, Operation
from txcore.launch.gloo_threads import yield_to_compute
from txcore.profiling.bandwidth import bus_factor


@dataclass(frozen=True)
class Setup:
    """State where and how collectives are measured.

    Attributes:
      mesh: of all devices that take part; the axes that are not measured make several groups,
        which communicate at the same time.
      axes: the mesh axes to communicate over.
      warmup: calls before the timed ones.
      iterations: timed calls.
      in_place: whether the operand is donated if the result is as large, as a gradient's buffer is
        in a step (nccl-tests' in-place); otherwise each result is a new array.
    """

    mesh: Mesh
    axes: Axes
    warmup: int = 5
    iterations: int = 20
    in_place: bool = True

    @property
    def group_size(self) -> int:
        """Devices that communicate with each other."""
        return int(np.prod([self.mesh.shape[axis] for axis in self.axes]))

    @property
    def groups(self) -> int:
        """Groups that communicate at the same time."""
        return self.mesh.size // self.group_size

    @functools.cached_property
    def members(self) -> dict[int, tuple[int, ...]]:
        """For each position in the mesh the positions of its group, by index in the group."""
        names = self.mesh.axis_names
        grid = np.arange(self.mesh.size).reshape(self.mesh.devices.shape)
        last = [names.index(axis) for axis in self.axes]
        rows = np.moveaxis(grid, last, range(-len(last), 0)).reshape(-1, self.group_size)
        return {position: tuple(row) for row in rows.tolist() for position in row}


@dataclass(frozen=True)
class Row:
    """Hold the measurements of one collective at one size.

    Attributes:
      operation, algorithm, dtype: what ran; the algorithm of a mean, else "".
      size_bytes: S as nccl-tests defines it.
      count: elements, as nccl-tests counts them.
      seconds: those of one call: the median on each rank, averaged over the ranks.
      least_seconds: the least median of a rank.
      spread: the interquartile range of a rank's calls, as a share of its median; the largest of
        all ranks.
      rank_seconds: the median of each rank.
      algorithm_bandwidth: S divided by the seconds, in bytes per second.
      bus_bandwidth: that times the bus factor, which makes sizes of groups comparable.
      wrong: elements that differ from NumPy's on any rank, before and after the timed calls.
    """

    operation: str
    algorithm: str
    dtype: str
    size_bytes: int
    count: int
    seconds: float
    least_seconds: float
    spread: float
    rank_seconds: tuple[float, ...]
    algorithm_bandwidth: float
    bus_bandwidth: float
    wrong: int


def measure_size(setup: Setup, operation: Operation, dtype: str, size: int) -> Row:
    """Measure a collective at one size; every process of the run calls it alike.

    Args:
      setup: where and how.
      operation: the collective.
      dtype: of the operand.
      size: the largest S in bytes; rounded down to whole elements that divide into the parts of the
        devices.

    Returns:
      The row, the same on every process.

    Raises:
      ValueError: S is less than an element for each device.

    Example:
      >>> from txcore import bench
      >>> mesh = tx.MeshSpec(jax.devices()[:2]).mesh
      >>> setup = bench.Setup(mesh, ("data",), warmup=1, iterations=3)
      >>> row = bench.measure_size(setup, bench.OPERATIONS["psum"], "float32", 4096)
      >>> row.count, row.wrong, row.bus_bandwidth == row.algorithm_bandwidth
      (1024, 0, True)
    """
    n = setup.group_size
    itemsize = jnp.dtype(dtype).itemsize
    count = operation.count(size, itemsize, n)
    if not count:
        least = itemsize * (n if operation.in_parts else 1)
        raise ValueError(
            f"{operation.name} needs a size of at least {least} bytes ({dtype} over {n} devices), "
            f"got {size}: raise --min-size"
        )
    yield_to_compute()
    compiled = compile_operation(setup, operation, dtype, operation.operand(count, n))
    draws = [draw_operand(seed) for seed in (0, 1)]
    wrong = check_results(setup, operation, dtype, count, compiled, draws[0])
    seconds = time_calls(setup, operation, dtype, count, compiled)
    wrong += check_results(setup, operation, dtype, count, compiled, draws[1])
    return _make_row(operation, dtype, count, n, *_gather_times(seconds, wrong))


def compile_operation(
    setup: Setup, operation: Operation, dtype: str, elements: int
) -> jax.stages.Compiled:
    """Compile a collective for an operand of shape (devices, elements), a row for each device."""
    everything = setup.mesh.axis_names

    def run_row(row: jax.Array) -> jax.Array:
        result = operation.run(row.reshape(-1), setup.axes)
        return collectives.vary(result, everything).reshape(1, -1)

    rows = P(everything)
    mapped = jax.shard_map(run_row, mesh=setup.mesh, in_specs=rows, out_specs=rows)
    sharding = NamedSharding(setup.mesh, rows)
    shape = jax.ShapeDtypeStruct((setup.mesh.size, elements), jnp.dtype(dtype), sharding=sharding)
    with _simulated_tpus() if operation.simulated else contextlib.nullcontext():
        same_size = jax.eval_shape(mapped, shape).shape == shape.shape
        donated = (0,) if setup.in_place and same_size else ()
        return jax.jit(mapped, donate_argnums=donated).lower(shape).compile()


def _simulated_tpus() -> contextlib.AbstractContextManager[Any]:
    from jax.experimental.pallas import tpu

    return tpu.force_tpu_interpret_mode()


def _make_operand(setup: Setup, elements: int, dtype: str, draw: Draw | None) -> jax.Array:
    """Return an operand, zeros without `draw`."""
    sharding = NamedSharding(setup.mesh, P(setup.mesh.axis_names))

    def make_row(index: tuple[slice, ...] | None) -> np.ndarray:
        position = (index[0].start or 0) if index else 0
        row = np.zeros(elements, np.int8) if draw is None else draw(position, 0, elements)
        return row.astype(jnp.dtype(dtype))[None]

    return jax.make_array_from_callback((setup.mesh.size, elements), sharding, make_row)


def check_results(
    setup: Setup,
    operation: Operation,
    dtype: str,
    count: int,
    compiled: jax.stages.Compiled,
    draw: Draw,
) -> int:
    """Run a compiled collective on drawn operands; count the wrong elements of this process."""
    n = setup.group_size
    elements = operation.operand(count, n)
    result = compiled(_make_operand(setup, elements, dtype, draw))
    wrong = 0
    for shard in result.addressable_shards:
        position = shard.index[0].start or 0
        group = setup.members[position]
        segments = operation.expect(group.index(position), n, elements)
        found = np.asarray(shard.data).reshape(-1)
        wrong += count_wrong(found, segments, group, draw, epsilon=_find_epsilon(operation, dtype))
    return wrong


def _find_epsilon(operation: Operation, dtype: str) -> float:
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        return 0.0
    sent = ["bfloat16"] if operation.algorithm == "bf16_wire" else []
    return max(float(jnp.finfo(name).eps) for name in (dtype, *sent))


def time_calls(
    setup: Setup, operation: Operation, dtype: str, count: int, compiled: jax.stages.Compiled
) -> list[float]:
    """Time each call until its result is there; return the seconds of the timed calls."""
    operand = _make_operand(setup, operation.operand(count, setup.group_size), dtype, None)
    seconds = []
    for _ in range(setup.warmup + setup.iterations):
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(operand))
        seconds.append(time.perf_counter() - start)
        if operand.is_deleted():
            operand = result
        del result  # or the next one is made beside it
    return seconds[setup.warmup :]


def _gather_times(seconds: list[float], wrong: int) -> tuple[np.ndarray, int]:
    """Return (median, lower quartile, upper quartile) of each rank, and the wrong of all."""
    quartiles = np.percentile(seconds, (50, 25, 75))
    if jax.process_count() == 1:
        return quartiles[None], wrong
    from jax.experimental.multihost_utils import process_allgather

    every, wrongs = process_allgather((quartiles.astype(np.float32), np.int32(wrong)))
    return np.asarray(every, np.float64), int(np.sum(wrongs, dtype=np.int64))


def _make_row(
    operation: Operation, dtype: str, count: int, n: int, ranks: np.ndarray, wrong: int
) -> Row:
    medians = ranks[:, 0]
    size, seconds = operation.total(count, n) * jnp.dtype(dtype).itemsize, float(medians.mean())
    return Row(
        operation=operation.name,
        algorithm=operation.algorithm,
        dtype=dtype,
        size_bytes=size,
        count=count,
        seconds=seconds,
        least_seconds=float(medians.min()),
        spread=float(((ranks[:, 2] - ranks[:, 1]) / medians).max()),
        rank_seconds=tuple(medians.tolist()),
        algorithm_bandwidth=size / seconds,
        bus_bandwidth=float(bus_factor(operation.kind, n)) * size / seconds,
        wrong=wrong,
    )
