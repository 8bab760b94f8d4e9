"""All-gather and reduce-scatter within a node of GPUs, by the switch between them.

The kernels are jax's own: each device writes its shard once, to an address that the switch copies
to all devices (`multimem.st`), or reads its shard of the sum from one that the switch adds up
(`multimem.ld_reduce`). They wait for each other at their end.
"""

import math
from typing import Any

import jax
from jax import lax

from txcore import _compat, varying
from txcore.kernels.dispatch import registry

# What a node has, by device kind: an NVSwitch that multiplies and adds (NVIDIA's NVLink SHARP).
_NODES = {"GB200": 72, "GB300": 72, "H100": 8, "H200": 8, "B200": 8, "B300": 8}
_WITHOUT_SWITCH = ("PCIe", "NVL")  # cards of these kinds, which are linked in pairs at most
_BLOCKS = 132  # all run at once, on the 132 multiprocessors of an H100: they wait for each other
_UNROLLED = 8  # vectors of 16 bytes that a thread moves in a step, at most
_THREADS = 128


def check_multimem(op: str, axis: str, device: str) -> None:
    """Refuse what the switch of a node cannot do.

    Raises:
      NotImplementedError: the GPU has no such switch, the axis is longer than its node, the mesh
        has another axis, or this jax has no such kernels.
    """
    instead = "leave algorithm= out: XLA calls NCCL there"
    words = device.split()  # "H200" is a part of "GH200", which has no such node
    node = next((_NODES[word] for word in words if word in _NODES), None)
    if node is None or any(word in words for word in _WITHOUT_SWITCH):
        raise NotImplementedError(
            f"{op} on GPUs needs those of a node with a switch that adds, {', '.join(_NODES)}, got "
            f"{device!r}: {instead}"
        )
    mesh = dict(jax.sharding.get_abstract_mesh().shape)
    others = [name for name, size in mesh.items() if size > 1 and name != axis]
    if others:
        raise NotImplementedError(
            f"{op} over {axis!r} on GPUs needs a mesh of that axis alone, since jax's kernels name "
            f"all of its devices, got {', '.join(map(repr, others))} too: {instead}"
        )
    if lax.axis_size(axis) > node:
        raise NotImplementedError(
            f"{op} over {axis!r} on {device} needs at most the {node} GPUs of one node, got "
            f"{lax.axis_size(axis)}: {instead}"
        )
    if _compat.multimem_kernels() is None:
        raise NotImplementedError(
            f"{op} on GPUs needs jax.experimental.pallas.ops.gpu.all_gather_mgpu and "
            f"reduce_scatter_mgpu, which jax {jax.__version__} does not have: {instead}"
        )


def runs_by_switch(interpret: Any) -> bool:
    """Tell whether a collective that is traced here goes through the switch of a node of GPUs."""
    on_gpu = registry.current_device()[0] == "gpu"
    return on_gpu and not interpret and not _compat.simulates_tpu()


def gather_flat(shard: jax.Array) -> jax.Array:
    """Return (n * k,), the shards (k,) of all devices of the mesh, k of whole tiles of 4 KiB."""

    def run(shard: jax.Array) -> jax.Array:
        gather, _ = _find_kernels()
        options = {"num_blocks": _BLOCKS, "tile_size": _tile_of(shard.size, shard)}
        return gather(shard, axis_name=_all_axes(), gather_dimension=0, **options)

    return varying.run_untracked(run, shard)  # type: ignore[no-any-return]


def scatter_flat(flat: jax.Array, size: int) -> jax.Array:
    """Return (k,), this device's shard of the sum of arrays (n * k,), k of whole tiles of 4 KiB."""

    def run(flat: jax.Array) -> jax.Array:
        _, scatter = _find_kernels()
        options = {"num_blocks": _BLOCKS, "tile_size": _tile_of(size, flat)}
        return scatter(flat, axis_name=_all_axes(), scatter_dimension=0, **options)

    return varying.run_untracked(run, flat)  # type: ignore[no-any-return]


def _find_kernels() -> Any:
    found = _compat.multimem_kernels()
    assert found is not None  # `check_multimem`
    return found


def _all_axes() -> tuple[str, ...]:
    return tuple(map(str, jax.sharding.get_abstract_mesh().axis_names))


def _tile_of(size: int, x: jax.Array) -> int:
    """Return how many elements a block moves in a step: of a power of two of vectors a thread."""
    # The switch moves integers one at a time.
    vector = 16 // x.dtype.itemsize if x.dtype.kind != "i" else 1
    vectors = size // (vector * _THREADS)
    return vector * _THREADS * math.gcd(vectors, _UNROLLED)
