"""Benchmarks run on 8 simulated CPU devices, as the tests do, where there is nothing else."""

import os

import jax

from txcore import _compat

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_compat.simulate_cpu_devices(8)
jax.devices()  # start the backend, so that no benchmark changes the number


def pytest_report_header(config):
    """Say what the figures stand for."""
    return f"jax {jax.__version__}, {jax.device_count()} {jax.default_backend()} devices"
