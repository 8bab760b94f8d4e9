"""What the kernels move and compute, counted from their code, against counting by hand."""

import math
import pathlib
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from txcore import kernels
from txcore.kernels.conv import mosaic
from txcore.kernels.conv.geometry import Blocks, Geometry
from txcore.kernels.conv.strips import Strips
from txcore.kernels.cross_entropy.pallas_rows import LossRuns
from txcore.kernels.dense import pallas as dense
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.optimizer import pallas as optimizer
from txcore.kernels.tuning.arithmetic import GPUS, Counts, count_kernels, seconds_by_limit

ROOT = pathlib.Path(__file__).parents[2]
GPU = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")


def counted(function, *shapes, dtype="float32", **options):
    """Count the kernels of a call on a GPU."""

    def run(*operands):
        return function(*operands, implementation="pallas_triton", **options)

    mesh = AbstractMesh((1,), ("i",), (AxisType.Auto,), abstract_device=GPU)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        return count_kernels(jax.jit(run).trace(*operands).jaxpr)


def test_a_dense_layer():
    config = dense.Config(rows=64, columns=32, inner=16)
    shapes = ((128, 256), (256, 96), (96,))
    [found] = counted(kernels.dense, *shapes, dtype="bfloat16", activation="relu", config=config)
    programs, steps = 2 * 3, 16
    factors = steps * (64 * 16 + 16 * 32) * 2
    assert found.loads == programs * (factors + 32 * 2 + 64 * 32 * 2)  # the bias, the result
    assert found.half_products == 2 * 128 * 96 * 256
    assert found.memory == 2 * (128 * 256 + 256 * 96 + 96 + 128 * 96)
    assert found.floats == programs * 64 * 32 * (steps + 1 + 1)  # the sums, the bias, ReLU
    assert found.special == 0


def test_a_convolution_multiplies_whole_blocks():
    config = Blocks(pixels=32, channels=16, depth=16)
    shapes = ((2, 8, 8, 3), (3, 3, 3, 20), (20,))
    [found] = counted(kernels.conv2d, *shapes, dtype="bfloat16", pool=2, config=config)
    programs, steps, corners = 1 * 2, 2, 4  # 27 products of each element are two steps of 16
    assert found.half_products == programs * steps * corners * 2 * 32 * 16 * 16
    result = 32 * 16 * (2 + 1)  # and one byte for the chosen element
    patches, weights = 32 * 16 * corners, 16 * 16
    assert found.loads == programs * (steps * (patches + weights) * 2 + 16 * 2 + result)


def test_an_update_moves_28_bytes_an_element():
    adam = {"step": 1, "learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
    sizes = ((1 << 20,),) * 4
    config = optimizer.Config(4096)
    [found] = counted(kernels.adamw, *sizes, **adam, weight_decay=0.1, config=config)
    programs, scalars = 256, 4 * 4
    assert found.loads == 28 * (1 << 20) + programs * scalars
    assert found.memory == 28 * (1 << 20) + scalars
    assert found.special == 4 * (1 << 20)  # three quotients and a root


def test_a_loop_whose_end_the_program_computes():
    labels = jnp.zeros(6, int)
    [found] = counted(
        lambda logits, **options: kernels.cross_entropy(logits, labels, **options),
        (6, 4096),
        config=LossRuns(1024),
    )
    results = 3 * 4
    assert found.loads == 6 * (4096 * 4 + 4 + 4 + results)  # a label and its score
    assert found.special == 6 * (4096 + 1024)  # and once for each of the run's sums


def test_a_loop_around_a_kernel_launches_it_in_each_turn():
    def repeat(x, implementation):
        def add(_, total):
            return total + kernels.squared_norm(x, implementation=implementation)

        return jax.lax.fori_loop(0, 5, add, 0.0)

    found = counted(repeat, (2048,))
    assert len(found) == 5
    assert len(set(found)) == 1


def test_a_kernel_of_which_nothing_is_used_is_not_launched():
    def run(x, implementation):
        kernels.squared_norm(x, implementation=implementation)
        return x

    assert counted(run, (2048,)) == []


def test_the_peaks_are_those_of_the_data_sheet():
    # H100 SXM: 67 TFLOP/s of float32, 989 of bfloat16 without sparsity, 3.35 TB/s.
    assert GPUS["H100"].floats == pytest.approx(67e12, rel=0.01)
    assert GPUS["H100"].half_products == pytest.approx(989e12, rel=0.01)
    limits = seconds_by_limit(Counts(memory=3350, half_products=989_400), GPUS["H100"])
    assert limits["memory"] == limits["half_products"] == pytest.approx(1e-9)
    assert limits["floats"] == 0


TPU_ROWS = {
    "5x5, 1 to 32 channels, of 28x28": ((256, 28, 28, 1), (5, 5, 1, 32)),
    "5x5, 32 to 64, of 14x14": ((256, 14, 14, 32), (5, 5, 32, 64)),
    "3x3, 1 to 32, of 28x28": ((256, 28, 28, 1), (3, 3, 1, 32)),
    "3x3, 32 to 64, of 14x14": ((256, 14, 14, 32), (3, 3, 32, 64)),
}


@pytest.mark.parametrize("name", TPU_ROWS)
def test_the_page_shows_what_a_tpus_strips_move_and_multiply(name):
    x, w = TPU_ROWS[name]
    options = (("activation", "relu"), ("padding", "SAME"), ("pool", 2))
    problem = Problem("conv2d", "tpu", "TPU v5 lite", (x, w, w[3:]), ("bfloat16",) * 3, options)
    images, filters = (jax.ShapeDtypeStruct(dims, "bfloat16") for dims in (x, w))
    geometry = Geometry.from_shapes(images, filters, "relu", 2, "SAME")
    strips = Strips.from_config(geometry, mosaic.list_configs(problem)[0])
    tiles = math.ceil(strips.depth / 128) * 128  # of the matrix unit
    multiplied = 2 * strips.flops * tiles / strips.depth  # two blocks of 128 images
    needed = 2 * math.prod(x[:3]) * math.prod(w)
    pooled = x[0] * x[1] * x[2] // 4 * w[3]
    moved = 2 * (math.prod(x) + math.prod(w) + pooled) + pooled
    row = (
        f"| {name} | {moved / 1e6:.1f} | {moved / 819e3:.1f} | {needed / 1e9:.2f} | "
        f"{multiplied / 1e9:.2f} | {multiplied / 197e6:.1f} |"
    )
    assert row in (ROOT / "docs" / "kernels.md").read_text()


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the page shows what jax 0.12 traces")
def test_the_page_shows_what_the_script_prints(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import gpu_arithmetic

    assert gpu_arithmetic.format_table() in (ROOT / "docs" / "kernels.md").read_text()
