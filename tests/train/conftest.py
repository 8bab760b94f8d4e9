"""The tests of this folder share what they compile."""

import importlib.util

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def compiled_dir(tmp_path_factory):
    """The folder of this process alone for what it compiles: jax writes its files in place."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def share_compiled(compiled_dir):
    """Compile a program once for all tests that run it: checkpoints need the same one many times.

    Two programs are the same where code and names are: by default jax leaves out the names, which
    audits read. With the lines of all callers in them no two would be, so the innermost is kept.
    """
    if any(map(importlib.util.find_spec, ("libtpu", "jax_cuda12_plugin"))):
        yield  # what is compiled for a machine that is not here can be written, but not read back
        return
    settings = {
        "jax_compilation_cache_dir": str(compiled_dir),
        "jax_compilation_cache_include_metadata_in_key": True,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_traceback_in_locations_limit": 1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax reads the folder once
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
