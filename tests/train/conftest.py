"""The tests of this folder share what they compile, and compile it quickly."""

import importlib.util

import pytest


@pytest.fixture(scope="module", autouse=True)
def compile_once(request):
    if any(map(importlib.util.find_spec, ("libtpu", "jax_cuda12_plugin"))):
        return  # what is compiled for a machine that is not here can be written, but not read back
    request.getfixturevalue("share_compiled")
    request.getfixturevalue("unoptimized")
