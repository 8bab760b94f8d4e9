"""Call a ring's kernel: compiled on TPU, simulated where that is asked for, refused elsewhere."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore import _compat, varying
from txcore.kernels.dispatch import registry
from txcore.kernels.ring import multimem
from txcore.kernels.ring.neighbours import Ring

DTYPES = ("float32", "bfloat16", "int32")
# Of a barrier semaphore, one for each mesh axis: kernels over one axis meet the same neighbours,
# and may share it. A user's own kernels usually count from 0.
_FIRST_COLLECTIVE_ID = 16


def check_ring(
    op: str, axis: Any, interpret: Any, *, on_gpu: bool = False, **arrays: jax.Array
) -> None:
    """Refuse what no kernel of a ring can run.

    Args:
      op: the function, for the errors.
      axis: of the mesh.
      interpret: None, or how to simulate TPUs.
      on_gpu: whether it is a collective that the switch of a node of GPUs has too.
      **arrays: the operands by name.

    Raises:
      TypeError: the axis is no name, or the dtype is none of `DTYPES`.
      NameError: the axis is not bound here.
      NotImplementedError: the device is no TPU (nor such a GPU), and no simulation was asked for;
        an array is vmapped; or an axis of the mesh is left to the partitioner.
    """
    if not isinstance(axis, str):
        raise TypeError(
            f"{op} needs axis= one mesh axis, a ring of devices, got {axis!r}: call it once for "
            "each axis, or use the collectives of txcore without algorithm="
        )
    if _compat.axis_size(axis) is None:
        bound = ", ".join(map(repr, _compat.bound_axes())) or "none"
        raise NameError(
            f"{op} needs a mesh axis that is bound here, got {axis!r}, where the bound ones are "
            f"{bound}: call it inside jax.shard_map over that axis"
        )
    if any(map(_compat.is_vmapped, arrays.values())):
        raise NotImplementedError(
            f"{op} needs whole arrays, got a row of what jax.vmap goes over: call it outside of "
            "the vmap, or use the collectives of txcore without algorithm="
        )
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise TypeError(
                f"{op} needs {name} of dtype {', '.join(DTYPES)}, got {array.dtype.name}: cast it, "
                "or use the collectives of txcore without algorithm="
            )
    platform, device = registry.current_device()
    if not interpret:
        check_platform(op, platform, on_gpu=on_gpu)
    _check_whole_mesh(op, axis)
    if multimem.runs_by_switch(interpret):
        multimem.check_multimem(op, axis, device)


def _check_whole_mesh(op: str, axis: str) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    bound = _compat.bound_axes()
    left = [name for name, size in mesh.shape.items() if size > 1 and name not in bound]
    if left:
        raise NotImplementedError(
            f"{op} over {axis!r} needs all axes of the mesh bound, since a kernel names a device "
            f"by its place along each, got {', '.join(map(repr, left))} left to the partitioner: "
            "leave axis_names= of jax.shard_map out, or use the collectives of txcore without "
            "algorithm="
        )


def check_platform(op: str, platform: str, *, on_gpu: bool = True) -> None:
    """Refuse a platform for which no kernel of a ring is compiled, unless TPUs are simulated.

    Args:
      op: the function or option, for the error.
      platform: "cpu", "gpu" or "tpu".
      on_gpu: whether it is a collective that the switch of a node of GPUs has too.

    Raises:
      NotImplementedError: with the alternative.
    """
    if platform == "tpu" or (platform == "gpu" and on_gpu) or _compat.simulates_tpu():
        return
    instead = {
        "gpu": "leave algorithm= out: XLA calls NCCL there",
        "cpu": "leave algorithm= out, or to test the kernel on CPU pass interpret=True, or run "
        "under jax.experimental.pallas.tpu.force_tpu_interpret_mode()",
    }.get(platform, "leave algorithm= out")
    needed = "TPUs, or the GPUs of one node," if on_gpu else "TPUs,"
    raise NotImplementedError(f"{op} needs {needed} got platform {platform!r}: {instead}")


def call_ring(
    kernel: Callable[..., None],
    axis: str,
    operands: Sequence[jax.Array],
    results: Sequence[tuple[tuple[int, ...], Any]],
    scratch: Sequence[Any],
    *,
    name: str,
    interpret: Any,
    flops: int = 0,
) -> list[jax.Array]:
    """Run a kernel once on each device, with references to whole arrays in HBM.

    Args:
      kernel: called with the `Ring`, and a reference to each operand, result and scratch array.
      axis: the mesh axis of the ring.
      operands: arrays that vary along the same mesh axes.
      results: shapes and dtypes.
      scratch: scratch types.
      name: of the kernel.
      interpret: None; True or a `pltpu.InterpretParams` to simulate it on CPU.
      flops: of its products, for XLA's scheduler and for `costs`.

    Returns:
      The results.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    in_hbm = pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)
    size, axes = ring_size(axis), _compat.bound_axes()

    def run_there(places: Any, *refs: Any) -> None:
        place = {name: places[i] for i, name in enumerate(axes)}
        kernel(Ring(axis, size, place), *refs)

    touched = sum(x.size * x.dtype.itemsize for x in operands)
    cost = pl.CostEstimate(flops=flops, bytes_accessed=touched, transcendentals=0)

    def run(places: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        return pl.pallas_call(  # type: ignore[no-any-return]
            run_there,
            [_compat.shape_like(arrays[0], shape, dtype) for shape, dtype in results],
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.MemorySpace.SMEM),
                *[in_hbm] * len(arrays),
            ],
            out_specs=[in_hbm] * len(results),
            scratch_shapes=list(scratch),
            cost_estimate=cost if flops else None,
            compiler_params=pltpu.CompilerParams(collective_id=_collective_id(axis)),
            interpret=pltpu.InterpretParams() if interpret is True else interpret or False,
            name=name,
            metadata={"sends_along": axis},
        )(places, *arrays)

    # Given from outside, untracked: inside of a kernel nothing can be cast to vary, neither where
    # it is compiled (an index plus 1 needs that) nor where it is simulated.
    places = jnp.stack([lax.axis_index(name) for name in axes])
    places = varying.claim(places, "", (), drop=_compat.varying_axes(places))
    operands = varying.match_varying(*operands)
    return varying.run_untracked(functools.partial(run, places), *operands)  # type: ignore[no-any-return]


def _collective_id(axis: str) -> int:
    names = [str(a) for a in jax.sharding.get_abstract_mesh().axis_names]
    return _FIRST_COLLECTIVE_ID + names.index(axis)


def ring_size(axis: str) -> int:
    """Return the number of devices along an axis."""
    return int(lax.axis_size(axis))


def add_wide(a: jax.Array, b: jax.Array) -> jax.Array:
    """Add two arrays of one dtype, bfloat16 in float32, rounded once."""
    wide = jnp.float32 if a.dtype == jnp.bfloat16 else a.dtype
    return (a.astype(wide) + b.astype(wide)).astype(a.dtype)
