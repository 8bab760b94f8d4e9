"""Benchmarks run on 8 simulated CPU devices, as the tests do, where there is nothing else."""

import os

import jax
import pytest

from txcore import _compat

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_compat.simulate_cpu_devices(8)
jax.devices()  # start the backend, so that no benchmark changes the number

# What each file measures: the groups of the tables and of `make bench`'s page.
SUITES = {
    "test_audit_bench": "audit of a compiled step",
    "test_collectives_bench": "collectives, by size",
    "test_exchange_bench": "step by its exchange of gradients",
    "test_gate_bench": "gate beside compiling",
    "test_hlo_bench": "reading a large module",
    "test_kernels_bench": "kernels, by shape and dtype",
    "test_train_bench": "MNIST training step",
}


def pytest_collection_modifyitems(items):
    """Give each benchmark its suite."""
    for item in items:
        if getattr(item, "module", None) and item.module.__name__ in SUITES:
            item.add_marker(pytest.mark.benchmark(group=SUITES[item.module.__name__]))


def pytest_benchmark_update_machine_info(config, machine_info):
    """Save jax's version, by which runs are compared."""
    machine_info["jax"] = jax.__version__


def pytest_report_header(config):
    """Say what the figures stand for."""
    return f"jax {jax.__version__}, {jax.device_count()} {jax.default_backend()} devices"
