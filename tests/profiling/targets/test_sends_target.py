"""What jax sends to single GPUs, and GPU kernels that send nothing, compiled for 8 H100."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from audit_cases import P, on, shape
from jax import lax
from target_cases import audit_remote_exchange, available

import txcore as tx
from txcore.profiling import audit

TARGET = "cuda:h100:8"
PAIRS = [(0, 1), (2, 3)]


def audited(body, **options):
    def build(mesh):
        fn = on(mesh, P("data"), P("data"), **options)(body)
        return fn, (shape(mesh, P("data"), 8 * 64, 128),)

    return audit(build, target=available(TARGET), mesh={"data": 8})


def test_a_psend_and_its_precv_are_one_permute_of_the_user():
    with warnings.catch_warnings():  # jax 0.12 says that it will move them
        warnings.simplefilter("ignore", DeprecationWarning)
        psend, precv = lax.psend, lax.precv

    def body(x):
        return precv(psend(x * 2, "data", PAIRS), jax.typeof(x), "data", PAIRS)

    report = audited(body, check_vma=False)
    assert report.exact, report
    [row] = report.collectives
    wanted = ("collective-permute", "user", ("data",), 64 * 128 * 4)
    assert (row.kind, row.origin, row.axes, row.payload_bytes) == wanted


def gpu_kernel(body, **scratch):
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

    def local(x):
        return plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype), **scratch)(x)

    return local


def test_a_local_gpu_kernel_leaves_a_program_exact():
    def double(x, out):
        out[...] = x[...] * jnp.float32(2)

    report = audited(gpu_kernel(double), check_vma=False)
    assert report.exact, report
    assert report.collectives == ()


def test_a_gpu_kernel_that_reads_its_neighbour_is_opaque():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def neighbour(x, out):
        out[...] = plgpu.remote_ref(x, (lax.axis_index("data") + 1) % 8)[...]

    report = audited(gpu_kernel(neighbour), check_vma=False)
    assert report.ok
    assert not report.exact
    assert [row.origin for row in report.collectives] == ["opaque"]


def test_the_collectives_by_multimem_that_come_with_jax_are_read():
    """A user's own calls of them: what goes to the switch, each device's operand once."""
    gather = pytest.importorskip("jax.experimental.pallas.ops.gpu.all_gather_mgpu").all_gather
    module = pytest.importorskip("jax.experimental.pallas.ops.gpu.reduce_scatter_mgpu")

    def body(x):
        whole = gather(x, axis_name=("data",), num_blocks=132)
        return module.reduce_scatter(
            whole, axis_name=("data",), scatter_dimension=0, num_blocks=132
        )

    report = audited(body, check_vma=False)
    assert report.status == "proved", report
    rows = [(row.kind, row.origin, row.payload_bytes) for row in report.collectives]
    assert rows == [("remote-dma", "user", n * 64 * 128 * 4) for n in (1, 8)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_collectives_by_the_switch(dtype):
    """Each device sends its shard once for a gather, and for a scatter all that is added."""
    item = jnp.dtype(dtype).itemsize

    def build(mesh):
        def body(x):
            part = tx.reduce_scatter(x, "data", algorithm="remote_dma", name="part")
            whole = tx.all_gather(part, "data", algorithm="remote_dma", name="whole")
            return tx.psum(whole[:7, 0], "data", algorithm="remote_dma", name="total")

        given = shape(mesh, P("data"), 8 * 8 * 512, 256, dtype=dtype)
        return on(mesh, P("data"), P())(body), (given,)

    report = audit(build, target=available(TARGET), mesh={"data": 8})
    assert report.status == "proved", report
    shard, tiny = 512 * 256 * item, 2 * 4096
    sent = [(row.tags, row.payload_bytes) for row in report.collectives]
    assert sent == [
        (("reduce_scatter/part",), 8 * shard),
        (("all_gather/whole",), shard),
        (("psum/total",), 8 * tiny),
        (("psum/total",), tiny),
    ]
    for row in report.collectives:
        found = (row.kind, row.origin, row.axes, row.group_size, row.dtype, row.wire_bytes)
        assert found == ("remote-dma", "txcore", ("data",), 8, dtype, row.payload_bytes)


@pytest.mark.parametrize("shard, sent", [(None, (8, 1)), ("gradients", (8,))])
def test_a_step_by_its_plan(shard, sent):
    """The plan predicts what the exchange of gradients sends: of 1,000, eight shards in tiles."""
    report = audit_remote_exchange(shard, TARGET)
    assert report.status == "proved", report
    kernels = [row.payload_bytes for row in report.collectives if row.kind == "remote-dma"]
    assert kernels == [shards * 2 * 4096 for shards in sent]
