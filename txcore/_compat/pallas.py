"""What each version of jax shows of Pallas kernels that are being traced, or were."""

import math
from collections.abc import Mapping
from typing import Any


def simulates_tpu() -> bool:
    """Tell whether Pallas TPU kernels are simulated here (`pltpu.force_tpu_interpret_mode`)."""
    from jax._src import config  # private: the context has no public question

    context = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
    return getattr(context, "value", None) is not None


def is_simulated(eqn: Any) -> bool:
    """Tell whether the kernel of a traced equation is to be simulated on the host."""
    return bool(eqn.params.get("interpret"))


def is_of_gpu(eqn: Any) -> bool:
    """Tell whether the kernel of a traced equation is one of Pallas' Mosaic GPU."""
    parameters = eqn.params.get("compiler_params")
    given = [*(parameters.values() if isinstance(parameters, Mapping) else (parameters,))]
    given += eqn.params.get("meshes", ())
    return any("mosaic_gpu" in type(one).__module__ for one in given)


def multimem_kernels() -> Any:
    """Return jax's own all-gather and reduce-scatter by multimem; None where it has none."""
    try:
        from jax.experimental.pallas.ops.gpu.all_gather_mgpu import all_gather
        from jax.experimental.pallas.ops.gpu.reduce_scatter_mgpu import reduce_scatter
    except (ImportError, AttributeError):  # they are no documented part of jax
        return None
    return all_gather, reduce_scatter


def kernel_name(eqn: Any) -> str:
    """Return the name of a traced equation's kernel, "" where this jax hides it."""
    named = eqn.params.get("name") or getattr(eqn.params.get("name_and_src_info"), "name", "")
    return str(named or "")


def kernel_metadata(eqn: Any) -> Mapping[str, str]:
    """Return what the author of a traced equation's kernel says of it (`metadata=`)."""
    return dict(eqn.params.get("metadata") or {})


def kernel_grid(eqn: Any) -> int | None:
    """Return how often the kernel of a pallas_call runs on one device; None if not known."""
    grid = getattr(eqn.params.get("grid_mapping"), "grid", None)
    if grid is None or not all(isinstance(size, int) for size in grid):
        return None
    return math.prod(grid)


def gpu_grid(eqn: Any) -> Mapping[str, int] | None:
    """Return the names and sizes of a Mosaic GPU kernel's grid; None where this jax hides it.

    A kernel of several threads has one more axis, whose threads run the same body.
    """
    given = eqn.params.get("meshes") or (eqn.params.get("mesh"),)
    shape = getattr(given[0], "shape", None) if len(given) == 1 else None
    return None if shape is None else {str(name): int(size) for name, size in shape.items()}


def reads_peer(eqn: Any) -> bool:
    """Tell whether an equation of a Mosaic GPU kernel moves memory of other devices by address."""
    text = "".join(map(str, eqn.params.values()))  # of jax's private transforms of a reference
    return "PeerMemRef" in text or "MulticastRef" in text


def remote_device(eqn: Any) -> Any:
    """Return whom an equation of a kernel talks to: the avals of its device id, None for nobody.

    A dict is of mesh axes; what it does not name is as here. Anything else may be any device.
    """
    # (semaphore, transforms, increment, device, core), or (source, target, semaphores, device)
    places = {"semaphore_signal": -2, "dma_start": -1}
    place = places.get(str(eqn.primitive.name))
    parts = _parts_of(eqn) if place is not None else None
    if parts is None:
        return None if place is None else ()  # of a form that is not known here
    return parts[place]


def copied_array(eqn: Any) -> tuple[int, Any] | None:
    """Return the elements and dtype of what a dma_start copies; None if this jax hides it."""
    parts = _parts_of(eqn)
    shape, dtype = (getattr(parts[0] if parts else None, name, None) for name in ("shape", "dtype"))
    if shape is None or dtype is None or not all(isinstance(size, int) for size in shape):
        return None
    return math.prod(shape), dtype


def _parts_of(eqn: Any) -> Any:
    tree = eqn.params.get("tree", eqn.params.get("args_tree"))
    unflatten = getattr(tree, "unflatten", None)
    return unflatten([v.aval for v in eqn.invars]) if unflatten is not None else None
