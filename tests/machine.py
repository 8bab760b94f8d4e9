"""What a test needs of the machine that it runs on, and how slow that machine is."""

import math
import os
import subprocess
import sys
import time

import jax
import pytest

IMPORT_S = 1.5  # to start Python and import jax, on an idle machine
ON_CPU = jax.default_backend() == "cpu"


def mesh(**axes: int) -> jax.sharding.Mesh:
    """Return a mesh of the first devices, or skip the test where there are too few."""
    wanted = math.prod(axes.values())
    if wanted > jax.device_count():
        pytest.skip(f"needs {wanted} devices, and {jax.device_count()} are here")
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types)


def cpu_only(reason: str) -> pytest.MarkDecorator:
    """Skip a test that asks what XLA's CPU compiler makes of a program."""
    return pytest.mark.skipif(not ON_CPU, reason=reason)


def within(seconds, bound_s):
    """Tell whether a wall-clock time is within a bound, which a busy machine stretches.

    A bound is for an idle machine. Only a time beyond it costs the measurement of this one.
    """
    return seconds < bound_s or seconds < bound_s * measure_slowness()


def measure_slowness():
    """Return how many times as slow as an idle machine this one is now, at least 1.

    By the start of a process that imports jax, and by the processes that wait for each core.
    """
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import jax"], check=True)
    imported = (time.monotonic() - start) / IMPORT_S
    return max(1.0, imported, os.getloadavg()[0] / (os.cpu_count() or 1))
