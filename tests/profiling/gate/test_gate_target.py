"""The gate also stops what is compiled for a TPU that is not there."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_cases import P, on, shape
from jax import lax
from jax.sharding import AxisType, Mesh

from txcore.profiling import AutoShardingError, no_auto_collectives

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: tpu-target"
)


@pytest.fixture
def mesh(monkeypatch):
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    return Mesh(np.array(devices).reshape(8), ("data",), axis_types=(AxisType.Auto,))


def test_a_matmul_over_a_sharded_dim_is_refused(mesh):
    args = shape(mesh, P(None, "data"), 64, 64), shape(mesh, P("data"), 64, 64)
    with no_auto_collectives(), pytest.raises(AutoShardingError) as error:
        jax.jit(jnp.dot).lower(*args).compile()
    (row,) = error.value.report.unexplained
    assert (row.kind, row.origin, row.axes) == ("all-reduce", "partitioner", ("data",))


def test_an_explicit_psum_passes(mesh):
    fn = on(mesh, P("data"), P())(lambda x: lax.psum(x, "data"))
    with no_auto_collectives():
        jax.jit(fn).lower(shape(mesh, P("data"), 64, 64)).compile()
