"""Every test runs on 8 simulated CPU devices ($JAX_NUM_CPU_DEVICES), before any backend starts."""

import collections
import contextlib
import os
import pathlib
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from txcore import _compat

# The hundreds of processes that tests start need not compile our own modules each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["TXCORE_TUNING"] = ""  # what was tuned on this machine changes no test
os.environ.pop("TXCORE_CACHE", None)  # nor does what was compiled before
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])  # jax read it when imported
_compat.simulate_cpu_devices(int(os.environ.get("JAX_NUM_CPU_DEVICES", "8")))
jax.devices()  # start the backend, so that no test changes the number

_FEW = 4  # cases of a test, of which none is left out
ROOT = pathlib.Path(__file__).resolve().parent.parent
MNIST = ROOT.parent / "shared" / "mnist"


def pytest_collection_modifyitems(config, items):
    """Leave out more of the same, but from longer runs; another Python takes another part of it."""
    longer = (name for name in os.environ if name.startswith(("TXCORE_EXTRA", "TXCORE_ALL_")))
    if any(os.environ[name] == "1" for name in longer):  # TXCORE_ALL_ANYTHING=1 says all
        return
    cases = collections.Counter(item.nodeid.partition("[")[0] for item in items)
    number = collections.Counter()
    left_out = []
    for item in items:
        name = item.nodeid.partition("[")[0]
        marker = item.get_closest_marker("sampled")
        every = marker.args[0] if marker and cases[name] >= _FEW else 1
        if item.get_closest_marker("extra") or (number[name] + sys.version_info.minor) % every:
            left_out.append(item)
        number[name] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = {*left_out}
        items[:] = [item for item in items if item not in gone]


def pytest_report_header(config):
    return f"jax {jax.__version__}, {jax.device_count()} {jax.default_backend()} devices"


@pytest.fixture(scope="module")
def unoptimized():
    """Compile without LLVM's optimisations: a third less time, and the HLO is the same.

    For tests whose time goes into compiling many programs that run once, here and in processes.
    """
    with pytest.MonkeyPatch.context() as patch, configured(jax_disable_most_optimizations=True):
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@contextlib.contextmanager
def configured(**settings):
    """Have jax's settings changed, and put them back."""
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="session")
def compiled_dir(tmp_path_factory):
    """The folder of this process alone for what it compiles: jax writes its files in place."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def share_compiled(compiled_dir):
    """Compile a program once for all tests that run it: checkpoints need the same one many times.

    Two programs are the same where code and names are: by default jax leaves out the names, which
    audits read. With the lines of all callers in them no two would be, so the innermost is kept.
    """
    with configured(
        jax_compilation_cache_dir=str(compiled_dir),
        jax_compilation_cache_include_metadata_in_key=True,
        jax_persistent_cache_min_compile_time_secs=0,
        jax_traceback_in_locations_limit=1,
    ):
        compilation_cache.reset_cache()  # jax reads the folder once
        yield
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def mnist_dir():
    """The folder with the real MNIST files, or skip."""
    path = pathlib.Path(os.environ.get("TXCORE_DATA", MNIST))
    if not (path / "train-images-idx3-ubyte.gz").exists():
        pytest.skip(f"real MNIST is not at {path}: set TXCORE_DATA to its folder")
    return path
