"""What the tests of rings share: a simulated ring of TPUs with its race detector, and data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-5, "int32": 0}


def mesh_of(**axes):
    count = int(np.prod(list(axes.values())))
    devices = np.array(jax.devices()[:count]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def simulated(**options):
    """Return the simulator's parameters, with its race detector and memory full of NaN."""
    names = {field.name for field in dataclasses.fields(pltpu.InterpretParams)}
    if "on_race" in names:  # jax 0.12 would raise in a callback; those before it go on
        options |= {"on_race": "warn"}
    return pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", **options)


def run_ring(function, mesh, *args, out_specs=None, check_vma=True):
    """Run a function of each device's row; return its results, a row for each device."""
    axes = P(mesh.axis_names)

    def run(*rows):
        return jax.tree.map(lambda y: y[None], function(*(row[0] for row in rows)))

    def run_equal(*rows):
        return function(*(row[0] for row in rows))

    body = run if out_specs is None else run_equal
    out = axes if out_specs is None else out_specs
    f = jax.shard_map(body, mesh=mesh, in_specs=axes, out_specs=out, check_vma=check_vma)
    try:
        return jax.tree.map(np.asarray, jax.jit(f)(*args))
    except Exception:
        pltpu.reset_tpu_interpret_mode_state()
        raise


def found_race():
    """Tell whether the last simulation found a race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


def make_rows(devices, shape, dtype="float32", seed=0):
    """Return one array of a shape for each device."""
    rng = np.random.default_rng(seed)
    if dtype == "int32":
        return rng.integers(-1000, 1000, (devices, *shape), dtype=np.int32)
    return np.asarray(jnp.asarray(rng.normal(size=(devices, *shape)), dtype))


def wide(x):
    return np.asarray(x, np.float64)


def assert_near(found, wanted, dtype):
    assert found.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(wide(found), wide(wanted), rtol=0, atol=TOLERANCE[dtype] * 8)
