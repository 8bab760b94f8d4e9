"""Collectives by the switch of a node of GPUs: JAX's kernels, run by NumPy, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from multimem_cases import H100, run_by_switch, trace
from ring_cases import assert_near, make_rows, wide

from txcore import _compat, kernels
from txcore.kernels.ring import multimem

CASES = [(2, "float32"), (4, "bfloat16"), (8, "int32")]


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """Let a kernel have fewer blocks than it moves tiles."""
    monkeypatch.setattr(multimem, "_BLOCKS", 2)


def assert_met(waits, devices):
    """Each block waits once on each device, for as many as there are, who all come."""
    assert waits
    assert set(waits) == {(devices, devices)}


@pytest.mark.parametrize(("devices", "dtype"), CASES)
def test_all_gather(devices, dtype):
    x = make_rows(devices, (3, 5000), dtype)
    found, waits = run_by_switch(lambda v: kernels.ring_all_gather(v, "data", dim=1), x)
    for row in found:
        np.testing.assert_array_equal(row, np.concatenate(list(x), axis=1))
    assert_met(waits, devices)


@pytest.mark.parametrize(("devices", "dtype"), CASES)
def test_reduce_scatter(devices, dtype):
    x = make_rows(devices, (3, devices * 1700), dtype)
    found, waits = run_by_switch(lambda v: kernels.ring_reduce_scatter(v, "data", dim=1), x)
    for row, wanted in zip(found, np.split(wide(x).sum(0), devices, axis=1), strict=True):
        assert_near(row, wanted, dtype)
    assert_met(waits, devices)


@pytest.mark.parametrize(("devices", "dtype"), CASES)
def test_all_reduce_and_its_transpose(devices, dtype):
    x = make_rows(devices, (7, 3), dtype)
    found, waits = run_by_switch(lambda v: kernels.ring_all_reduce(v, "data"), x)
    for row in found:
        assert_near(row, wide(x).sum(0), dtype)
        np.testing.assert_array_equal(row, found[0])  # to the last bit
    assert_met(waits, devices)


def test_a_gather_s_gradient_is_a_scatter():
    x, g = make_rows(2, (3, 4)), make_rows(2, (6, 4), seed=1)

    def gradient(x, g):
        return jax.vjp(lambda v: kernels.ring_all_gather(v, "data"), x)[1](g)[0]

    found, _ = run_by_switch(gradient, x, g)
    for row, wanted in zip(found, np.split(wide(g).sum(0), 2), strict=True):
        assert_near(row, wanted, "float32")


def gather(x):
    return kernels.ring_all_gather(x, "data")


REFUSED = {
    "an older card": (
        *(gather, "NVIDIA A100-SXM4-80GB", {"data": 2}),
        "needs those of a node with a switch that adds, GB200, GB300, H100, H200, B200, B300, got "
        "'NVIDIA A100-SXM4-80GB': leave algorithm= out: XLA calls NCCL there",
    ),
    "no switch": (gather, "NVIDIA H100 PCIe", {"data": 2}, "got 'NVIDIA H100 PCIe': leave"),
    "another chip": (gather, "NVIDIA GH200 480GB", {"data": 2}, "got 'NVIDIA GH200 480GB': leave"),
    "two nodes": (gather, H100, {"data": 16}, "at most the 8 GPUs of one node, got 16: leave"),
    "another axis": (
        *(gather, H100, {"data": 2, "model": 4}),
        "needs a mesh of that axis alone, since jax's kernels name all of its devices, got "
        "'model' too: leave",
    ),
    "a product": (
        lambda x: kernels.ring_all_gather_matmul(x, x.T, "data"),
        *(H100, {"data": 2}),
        "ring_all_gather_matmul needs TPUs, got platform 'gpu': leave algorithm= out: XLA calls",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_switch_cannot_do_is_refused(case):
    function, kind, axes, text = REFUSED[case]
    rows = np.zeros((int(np.prod(list(axes.values()))), 4, 4), np.float32)
    with pytest.raises(NotImplementedError) as error:
        trace(function, rows, kind=kind, **axes)
    assert text in str(error.value)


def test_a_jax_without_the_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(_compat, "multimem_kernels", lambda: None)
    with pytest.raises(NotImplementedError, match=f"which jax {jax.__version__} does not have"):
        trace(gather, np.zeros((2, 4), np.float32), data=2)


def test_another_dtype_is_refused():
    with pytest.raises(TypeError, match="float32, bfloat16, int32, got float16: cast it, or use"):
        trace(gather, np.zeros((2, 4), np.float16), data=2)


def test_on_one_gpu_there_is_no_kernel():
    assert "mpmd_map" not in str(trace(gather, np.zeros((1, 4), np.float32), data=1))
    assert "mpmd_map" in str(trace(gather, np.zeros((2, 4), jnp.bfloat16), data=2))
