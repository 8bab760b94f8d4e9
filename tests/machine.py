"""What a test needs of the machine that it runs on; without it the test is skipped."""

import math

import jax
import pytest

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
