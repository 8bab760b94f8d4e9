"""Run every collective on this very backend, and hold its results to NumPy's."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from txcore import collectives
from txcore.bench import OPERATIONS, Operation, Setup, algorithms_for, mean_by
from txcore.bench.check import draw_operand
from txcore.bench.measure import check_results, compile_operation
from txcore.bench.operations import Axes, Run
from txcore.launch import key_value
from txcore.outside import first_line

DTYPES = ("float32", "bfloat16", "float16", "int32", "int8")
# Elements of a device's part: one, an odd number, and more than any backend sends in one piece.
COUNTS = (1, 257, 1 << 18)


@dataclass(frozen=True)
class Checked:
    """Hold what one collective did with one dtype, on the devices of all processes.

    Attributes:
      operation, dtype: what ran.
      wrong: elements that differ from NumPy's, over all sizes.
      ranks: the processes that have such elements.
      error: why it could not run, in one line; "" where it did.
      instead: what gives the right result here, tried in the same run; "" where nothing is wrong,
        or nothing else is right.
    """

    operation: str
    dtype: str
    wrong: int = 0
    ranks: tuple[int, ...] = ()
    error: str = ""
    instead: str = ""

    @property
    def ok(self) -> bool:
        """Tell whether all elements of all sizes are right."""
        return not (self.wrong or self.error)


def check_collectives(
    setups: Sequence[Setup],
    begin: Callable[[str], None] = lambda what: None,
    dtypes: Sequence[str] = DTYPES,
) -> Iterator[Checked]:
    """Check every collective for every dtype; every process of a run calls it alike.

    Args:
      setups: the groups of devices to communicate within; each of them is tried.
      begin: called with what is about to run, which may never return.
      dtypes: of the operands.

    Yields:
      What was found, for each collective and dtype; the same on every process.

    Example:
      >>> from txcore import bench, doctor
      >>> setup = bench.Setup(tx.MeshSpec(jax.devices()[:2]).mesh, ("data",))
      >>> found = list(doctor.check_collectives([setup], dtypes=["float32"]))
      >>> len(found), all(checked.ok for checked in found)
      (8, True)
    """
    for operation in OPERATIONS.values():
        for dtype in dtypes:
            if operation.name == "pmean" and "int" in dtype:
                continue  # the mean of integers is none
            checked = _check(setups, operation, dtype, begin)
            if not checked.ok:
                checked = replace(checked, instead=_find_other(setups, checked, begin))
            yield checked


def _check(
    setups: Sequence[Setup],
    operation: Operation,
    dtype: str,
    begin: Callable[[str], None],
    way: str = "",
) -> Checked:
    """Check one collective; `way` names another way to its result."""
    wrong, error = 0, ""
    name = f"{way} in the place of {operation.name}" if way else operation.name
    try:
        for setup, count in itertools.product(setups, COUNTS):
            begin(f"{name} of {count} {dtype} over {setup.group_size} devices")
            elements = operation.operand(count, setup.group_size)
            compiled = compile_operation(setup, operation, dtype, elements)
            given = setup, operation, dtype, count, compiled
            wrong += check_results(*given, draw_operand(seed=count))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as failure:
        error = first_line(failure)
    # Through the coordinator: the ranks that are right have to learn it without a collective.
    told = key_value.gather(f"doctor/{name}/{dtype}", json.dumps([wrong, error]))
    said = [json.loads(text) for text in told]
    return Checked(
        operation.name,
        dtype,
        wrong=sum(of_rank for of_rank, _ in said),
        ranks=tuple(rank for rank, (of_rank, _) in enumerate(said) if of_rank),
        error=next((of_rank for _, of_rank in said if of_rank), ""),
    )


def _find_other(setups: Sequence[Setup], checked: Checked, begin: Callable[[str], None]) -> str:
    """Return the first other way to the same result that is right here, "" without one."""
    for way, operation in _list_others(setups, OPERATIONS[checked.operation]):
        if _check(setups, operation, checked.dtype, begin, way).ok:
            return way
    return ""


def _list_others(setups: Sequence[Setup], operation: Operation) -> Iterator[tuple[str, Operation]]:
    if operation.name in _OTHERS:
        way, run = _OTHERS[operation.name]
        yield way, replace(operation, run=run)
        return
    platform = setups[0].mesh.devices.flat[0].platform
    lacking = [algorithms_for([s.mesh.shape[axis] for axis in s.axes], platform) for s in setups]
    for name in lacking[0]:
        if name != "plain" and not any(lacks[name] for lacks in lacking):
            yield f"tx.DP(algorithm={name!r})", mean_by(name)


def _gather(x: jax.Array, axes: Axes) -> jax.Array:
    """Return the operands of all devices, (devices, elements)."""
    return collectives.all_gather(x[None], axes)


def _sum_gathered(x: jax.Array, axes: Axes) -> jax.Array:
    wide = jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
    return jnp.sum(_gather(x, axes), axis=0, dtype=wide).astype(x.dtype)


def _max_gathered(x: jax.Array, axes: Axes) -> jax.Array:
    return jnp.max(_gather(x, axes), axis=0)


def _take_own(x: jax.Array, axes: Axes) -> jax.Array:
    """Return this device's part of an array, of as many parts as there are devices."""
    parts = x.reshape(collectives.axis_size(axes), -1)
    return lax.dynamic_index_in_dim(parts, collectives.axis_index(axes), keepdims=False)


def _scatter_sum(x: jax.Array, axes: Axes) -> jax.Array:
    return _take_own(collectives.psum(x, axes), axes)


def _place_own(x: jax.Array, axes: Axes) -> jax.Array:
    """Return zeros for all devices' arrays but for this one's, (devices, elements)."""
    zeros = jnp.zeros((collectives.axis_size(axes), *x.shape), x.dtype)
    zeros = collectives.vary(zeros, axes)
    return lax.dynamic_update_index_in_dim(zeros, x, collectives.axis_index(axes), 0)


def _gather_by_sum(x: jax.Array, axes: Axes) -> jax.Array:
    return collectives.psum(_place_own(x, axes), axes).reshape(-1)


def _exchange_gathered(x: jax.Array, axes: Axes) -> jax.Array:
    n = collectives.axis_size(axes)
    every = _gather(x, axes).reshape(n, n, -1)  # (from, to, elements)
    own = lax.dynamic_index_in_dim(every, collectives.axis_index(axes), 1, keepdims=False)
    return own.reshape(-1)


def _shift_gathered(x: jax.Array, axes: Axes) -> jax.Array:
    before = (collectives.axis_index(axes) - 1) % collectives.axis_size(axes)
    return lax.dynamic_index_in_dim(_gather(x, axes), before, keepdims=False)


def _broadcast_gathered(x: jax.Array, axes: Axes) -> jax.Array:
    return _gather(x, axes)[0]


# Another way to the same result, by another collective, and how to write it.
_OTHERS: Mapping[str, tuple[str, Run]] = {
    "psum": ("tx.all_gather(x, axis), then jnp.sum", _sum_gathered),
    "pmax": ("tx.all_gather(x, axis), then jnp.max", _max_gathered),
    "all_gather": ("tx.psum of zeros with this device's part in its place", _gather_by_sum),
    "reduce_scatter": ("tx.psum(x, axis), then this device's part", _scatter_sum),
    "all_to_all": ("tx.all_gather(x, axis), then this device's parts", _exchange_gathered),
    "ppermute": ("tx.all_gather(x, axis), then the neighbour's part", _shift_gathered),
    "broadcast": ("tx.all_gather(x, axis), then the root's part", _broadcast_gathered),
}
