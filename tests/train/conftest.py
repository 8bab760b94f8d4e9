"""The tests of this folder share what they compile, and compile it quickly."""

import importlib.util

import pytest

# What is said to be equal to the last bit is so in programs as users compile them.
OPTIMIZED = {"test_nonfinite", "test_recording"}


@pytest.fixture(scope="module", autouse=True)
def compile_once(request):
    if any(map(importlib.util.find_spec, ("libtpu", "jax_cuda12_plugin"))):
        return  # what is compiled for a machine that is not here can be written, but not read back
    request.getfixturevalue("share_compiled")
    if request.module.__name__ not in OPTIMIZED:
        request.getfixturevalue("unoptimized")
