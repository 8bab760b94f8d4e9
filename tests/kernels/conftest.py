"""The kernels' tests hold float32 to float64 oracles, on a GPU too."""

import pathlib

import jax
import pytest
from machine import ON_CPU

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    """Compute float32 products in float32: a GPU rounds their operands to TF32 by default."""
    if ON_CPU:  # its default is full precision, and what is tested
        yield
        return
    with jax.default_matmul_precision("highest"):
        yield


def pytest_collection_modifyitems(items):
    """Let Pallas kernels be compiled on a GPU: jax 0.11 and 0.12 warn of it."""
    warning = "ignore:The Pallas Triton backend:DeprecationWarning"
    for item in items:
        if not ON_CPU and item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.filterwarnings(warning))
