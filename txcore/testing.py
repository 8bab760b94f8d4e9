"""Test models and steps: run a function sharded, compare two plans or runs, name activations."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from txcore.parity.plans import assert_plans_agree as assert_plans_agree
from txcore.parity.recording import record as record
from txcore.parity.runs import assert_runs_agree as assert_runs_agree


def run_sharded(
    f: Callable[..., Any],
    *args: Any,
    axes: Mapping[str, int],
    in_specs: Any = None,
    out_specs: Any = None,
    check_vma: bool = True,
) -> Any:
    """Run `f` inside `shard_map` on the first devices, and return NumPy arrays.

    Args:
      f: function written for one device.
      *args: pytrees of host arrays.
      axes: the mesh: size of each axis by name.
      in_specs: specs of the arguments; by default the leading dim over all axes.
      out_specs: specs of the results; by default the same.
      check_vma: whether jax tracks along which axes values vary.

    Returns:
      The results as NumPy arrays.

    Raises:
      ValueError: there are fewer devices than the mesh needs.

    Example:
      >>> tx.testing.run_sharded(lambda x: tx.psum(x, "data"), np.ones(2), axes={"data": 2})
      array([2., 2.], dtype=float32)
    """
    sizes = tuple(axes.values())
    need, have = int(np.prod(sizes)), jax.device_count()
    if have < need:
        raise ValueError(
            f"run_sharded needs {need} devices for the mesh {dict(axes)}, got {have}: set "
            f"jax.config.update('jax_num_cpu_devices', {need}) before jax touches a device"
        )
    devices = np.array(jax.devices()[:need], dtype=object).reshape(sizes)
    mesh = Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(sizes))
    everything = P(tuple(axes))
    mapped = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=everything if in_specs is None else in_specs,
        out_specs=everything if out_specs is None else out_specs,
        check_vma=check_vma,
    )
    return jax.tree.map(np.asarray, jax.jit(mapped)(*args))
