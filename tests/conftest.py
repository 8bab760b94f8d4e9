"""Every test runs on 8 simulated CPU devices ($JAX_NUM_CPU_DEVICES), before any backend starts."""

import collections
import os
import pathlib
import sys

import jax
import pytest

from txcore import _compat

# The hundreds of processes that tests start need not compile our own modules each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["TXCORE_TUNING"] = ""  # what was tuned on this machine changes no test
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])  # jax read it when imported
_compat.simulate_cpu_devices(int(os.environ.get("JAX_NUM_CPU_DEVICES", "8")))
jax.devices()  # start the backend, so that no test changes the number

_FEW = 4  # cases of a test, of which none is left out
ROOT = pathlib.Path(__file__).resolve().parent.parent
MNIST = ROOT.parent / "shared" / "mnist"


def pytest_collection_modifyitems(config, items):
    """Leave out more of the same; another Python takes another part of it."""
    if os.environ.get("TXCORE_EXTRA") == "1":
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

    For tests whose time goes into compiling many programs that run once.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def mnist_dir():
    """The folder with the real MNIST files, or skip."""
    path = pathlib.Path(os.environ.get("TXCORE_DATA", MNIST))
    if not (path / "train-images-idx3-ubyte.gz").exists():
        pytest.skip(f"real MNIST is not at {path}: set TXCORE_DATA to its folder")
    return path
