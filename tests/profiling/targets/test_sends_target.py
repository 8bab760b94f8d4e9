"""What jax sends to single GPUs, and GPU kernels that send nothing, compiled for 8 H100."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from audit_cases import P, on, shape
from jax import lax
from target_cases import available

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


def test_the_collectives_by_multimem_that_come_with_jax_compile():
    """Those that a kernel of ours would have to beat; what they send is not read."""
    gather = pytest.importorskip("jax.experimental.pallas.ops.gpu.all_gather_mgpu").all_gather
    module = pytest.importorskip("jax.experimental.pallas.ops.gpu.reduce_scatter_mgpu")

    def body(x):
        whole = gather(x, axis_name=("data",), num_blocks=132)
        return module.reduce_scatter(
            whole, axis_name=("data",), scatter_dimension=0, num_blocks=132
        )

    report = audited(body, check_vma=False)
    assert report.status == "not proved"
    assert [(row.kind, row.origin) for row in report.collectives] == [("custom-call", "opaque")] * 2
