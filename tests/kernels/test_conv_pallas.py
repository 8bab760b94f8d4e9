"""The Pallas convolution alone: its blocks, what it refuses, and its lowering for a GPU."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv_cases import POOLED, WIDE, forward_and_gradients, truths
from jax.sharding import AbstractDevice, AbstractMesh
from kernel_cases import conv_case

from txcore import kernels
from txcore.kernels.conv import pallas
from txcore.kernels.conv.geometry import Blocks
from txcore.kernels.dispatch.problem import Problem

GPU = AbstractMesh(
    (1,),
    ("i",),
    axis_types=(jax.sharding.AxisType.Auto,),
    abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu"),
)


def problem(x, w, dtype="float32", platform="cpu"):
    options = {"activation": None, "pool": None, "padding": "SAME"}
    return Problem("conv2d", platform, "cpu", (x, w, w[3:]), (dtype,) * 3, tuple(options.items()))


def test_the_public_name_runs_the_best_guess():
    args = POOLED.args(jnp.float32)

    def op(x, w, b):
        return kernels.conv2d(x, w, b, **POOLED.options, implementation="pallas")

    got = forward_and_gradients(op)(*args)
    for result, truth in zip(got, truths(POOLED, args), strict=True):
        np.testing.assert_allclose(result, truth, rtol=1e-5, atol=2e-5)


def test_an_empty_batch_is_refused():
    text = (
        "conv2d: implementation='pallas' was asked for, but its kernel needs at least one "
        "pixel, and x is (0, 6, 6, 1): pass 'xla', or leave implementation out to have one "
        "chosen"
    )
    x, w, b = jnp.zeros((0, 6, 6, 1)), jnp.ones((3, 3, 1, 4)), jnp.ones(4)
    with pytest.raises(NotImplementedError, match=re.escape(text)):
        kernels.conv2d(x, w, b, implementation="pallas")
    assert kernels.conv2d(x, w, b).shape == (0, 6, 6, 4)


def test_more_elements_than_32_bits_count_are_refused():
    below, above = (2**17 - 1, 128, 128, 1), (2**17, 128, 128, 1)
    assert pallas.explain_refusal(problem(below, (3, 3, 1, 1))) is None
    reason = "its kernel counts elements in 32 bits, up to 2147483647, and an array of 2147483648 "
    assert (
        pallas.explain_refusal(problem(above, (3, 3, 1, 1)))
        == reason + "is needed (use smaller batches)"
    )
    assert "an array of 4294934528 is" in pallas.explain_refusal(problem(below, (3, 3, 1, 2)))


def test_a_dtype_that_it_does_not_compute_in_is_refused():
    assert pallas.explain_refusal(problem((1, 4, 4, 1), (3, 3, 1, 1), "float8_e4m3fn")) == (
        "its kernel computes in float16, bfloat16, float32, float64, and the operands are "
        "float8_e4m3fn"
    )


@pytest.mark.parametrize(
    "given, text",
    [
        ({"pixels": 48}, "pixels of Blocks needs a power of two of at least 16, got 48"),
        ({"channels": 8}, "channels of Blocks needs a power of two of at least 16, got 8"),
        ({"depth": 32.0}, "depth of Blocks needs a power of two of at least 16, got 32.0"),
        ({"splits": 0}, "splits of Blocks needs an integer of at least 1, got 0"),
        ({"warps": 3}, "warps of Blocks needs a power of two of at least 1, got 3"),
    ],
)
def test_blocks_that_cannot_be_are_refused(given, text):
    with pytest.raises(ValueError, match=re.escape(f"conv2d: {text}")):
        Blocks(**given)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("features", [1, 33, 1000])
def test_the_blocks_cover_what_there_is_and_little_more(platform, features):
    for blocks in pallas.list_configs(
        problem((8, 14, 14, 3), (3, 3, 3, features), "float32", platform)
    ):
        assert blocks.channels <= max(16, min(64, 2 * features - 1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "case", [POOLED, WIDE, conv_case("bare", (2, 5, 5, 2), (1, 2, 2, 3))], ids=lambda c: c.name
)
def test_all_three_kernels_lower_for_a_gpu_that_is_not_here(case, dtype):
    args = case.args(dtype)

    def op(x, w, b):
        return kernels.conv2d(x, w, b, **case.options, implementation="pallas")

    with jax.sharding.use_abstract_mesh(GPU), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        traced = forward_and_gradients(op).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 3
    interpreted = ("while", "gather", "scatter", "convolution", "dot_general")
    assert not any(f"stablehlo.{name}" in text for name in interpreted)
