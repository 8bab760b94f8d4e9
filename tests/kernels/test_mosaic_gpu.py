"""The dense layer by Mosaic GPU, simulated with races detected, against float64."""

import jax
import jax.numpy as jnp
import kernel_oracles as oracles
import machine
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from txcore import kernels
from txcore.kernels.dense.api import KERNELS
from txcore.kernels.dense.mosaic_gpu import Config
from txcore.kernels.dispatch.problem import Problem

pytestmark = machine.cpu_only("it simulates a GPU")
newer = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 has no simulator")
if jax.__version_info__ >= (0, 11):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
SMALL = Config(rows=64, columns=64, inner=64, stages=2)


def found_races():
    return gpu_callbacks.get_races().races_found


@newer
@pytest.mark.parametrize("activation", [None, "relu"])
def test_it_is_as_accurate_as_xla_and_races_with_nobody(activation):
    random = np.random.default_rng(0)
    shapes = ((70, 200), (200, 100), (100,))  # odd: the last tiles are padded
    args = [jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in shapes]

    def gradients(**options):
        def op(*args):
            return kernels.dense(*args, activation=activation, **options)

        out, transpose = jax.vjp(op, *args)
        return out, *transpose(out)

    with mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams(detect_races=True)):
        ours = gradients(implementation="mosaic_gpu", config=SMALL)
        jax.block_until_ready(ours)
    assert not found_races()
    theirs = gradients(implementation="xla")

    def errors(results):
        g = np.asarray(results[0], np.float64)
        out, truths = oracles.dense(*args, g=lambda _: g, activation=activation)
        pairs = zip(results, (out, *truths), strict=True)
        return [np.linalg.norm(np.asarray(got, np.float64) - true) for got, true in pairs]

    for mine, other in zip(errors(ours), errors(theirs), strict=True):
        assert mine <= 2 * other


def problem(dtype="bfloat16", device="NVIDIA H100 80GB HBM3", activation=None, dropout=0.0):
    shapes = ((8, 16), (16, 4), (4,))
    options = (("activation", activation), ("dropout", dropout))
    return Problem("dense", "gpu", device, shapes, (dtype,) * 3, options)


REFUSED = {
    "float32": (
        problem("float32"),
        "multiplies bfloat16 and float16, and the operands are float32",
    ),
    "a gelu": (problem(activation="gelu"), "no dropout, and no activation but None and 'relu'"),
    "dropout": (problem(dropout=0.5), "its kernel has no dropout"),
    "an A100": (
        problem(device="NVIDIA A100"),
        "is for H100 and H200, and the device is NVIDIA A100",
    ),
}


@newer
@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_compute_is_refused(case):
    what, text = REFUSED[case]
    assert text in KERNELS["mosaic_gpu"].refuse(what)
    assert KERNELS["mosaic_gpu"].refuse(problem()) is None


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="jax 0.10 has another language")
def test_an_older_jax_is_refused():
    reason = KERNELS["mosaic_gpu"].refuse(problem())
    assert reason == f"its kernel needs jax 0.11 or newer, and {jax.__version__} is installed"


@newer
def test_a_planted_race_is_found():
    def read_early(x, out, *, shared, arrived):
        mosaic_gpu.copy_gmem_to_smem(x, shared, arrived)
        out[...] = shared[...]
        mosaic_gpu.barrier_wait(arrived)

    run = mosaic_gpu.kernel(
        read_early,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch_types={
            "shared": mosaic_gpu.SMEM((128,), jnp.float32),
            "arrived": mosaic_gpu.Barrier(),
        },
        interpret=mosaic_gpu.InterpretGPUParams(detect_races=True),
    )
    raised = ""
    try:
        jax.block_until_ready(run(jnp.ones(128)))
    except jax.errors.JaxRuntimeError as error:  # jax 0.11 notes it, and goes on
        raised = str(error)
    assert "RACE DETECTED" in raised or found_races()
    gpu_callbacks.reset_gpu_interpret_mode_state()


@newer
@pytest.mark.parametrize("checked", [True, False])
def test_in_shard_map_and_under_vmap_it_is_the_kernel(checked):
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((2,), ("i",), (AxisType.Auto,), abstract_device=device)

    def gradients(x, w, b):
        def op(*args):
            return kernels.dense(*args, activation="relu", implementation="mosaic_gpu")

        out, transpose = jax.vjp(op, x, w, b)
        return out, transpose(out)[0]

    mapped = jax.shard_map(
        jax.vmap(gradients, in_axes=(0, None, None)),
        mesh=mesh,
        in_specs=(P("i"), P(), P()),
        out_specs=P("i"),
        check_vma=checked,
    )
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4, 5, 16), (16, 8), (8,))]
    text = jax.jit(mapped).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
