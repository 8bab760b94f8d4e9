"""What this machine and this jax are: the facts that a report of a defect needs."""

import os
import pathlib
import platform
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import NamedTuple

import jax

from txcore import _compat
from txcore.outside import first_line, printable

_PACKAGES = (
    *("txcore", "jax", "jaxlib", "numpy"),
    *("optax", "orbax-checkpoint", "tqdm", "matplotlib", "scikit-learn"),
    *("jax-triton", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
)
# Variables that change how programs are compiled or how processes find each other.
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "NCCL_", "GLOO_", "CUDA_", "TXCORE_", "OMP_")
_SECRETS = ("TOKEN", "SECRET", "PASSWORD", "KEY")
_SETTINGS = (
    *("jax_default_prng_impl", "jax_threefry_partitionable", "jax_enable_x64"),
    *("jax_default_matmul_precision", "jax_disable_most_optimizations", "jax_optimization_level"),
    *("jax_debug_nans", "jax_numpy_dtype_promotion"),
)

Rows = list[tuple[str, ...]]


class Section(NamedTuple):
    """A title, and its facts: names with their values."""

    title: str
    rows: Rows


def list_facts() -> Iterator[Section]:
    """Yield the facts in sections, those that need no backend first: starting one may hang.

    Example:
      >>> from txcore import doctor
      >>> [section.title for section in doctor.list_facts()][:3]
      ['versions', 'machine', 'variables']
    """
    yield Section("versions", list_versions())
    yield Section("machine", list_machine())
    yield Section("variables", list_variables(os.environ))
    yield Section("devices", list_devices())
    yield Section("settings of jax", list_settings())
    yield Section("XLA options of a step", list_options())
    yield Section("kernels for float32, and why", list_kernels())


def list_versions() -> Rows:
    """Return the versions of Python, of this system and of packages, "-" for those not there."""
    rows: Rows = [("python", platform.python_version()), ("platform", platform.platform())]
    return [*rows, *((name, _find_version(name)) for name in _PACKAGES)]


def _find_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def list_machine() -> Rows:
    """Return the cores, memory, limits and network interfaces of this process's machine."""
    rows: Rows = [("cores", f"{count_cores()} of {os.cpu_count()} that the machine has")]
    memory = read_memory()
    if memory:
        sizes = [f"{memory[name] / 2**30:.1f} GiB" for name in ("MemTotal", "MemAvailable")]
        rows.append(("memory", f"{sizes[0]}, of which {sizes[1]} are available"))
    if (files := read_open_files()) is not None:
        rows.append(("open files", f"{files[0]}, at most {files[1]}"))
    if (free := read_free_bytes("/dev/shm")) is not None:
        rows.append(("shared memory", f"{free / 2**30:.1f} GiB free"))
    rows.append(("interfaces", ", ".join(name for _, name in socket.if_nameindex())))
    name = printable(socket.gethostname())
    rows.append(("address of this host's name", find_address(name) or f"none for {name}"))
    return rows


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_memory() -> dict[str, int]:
    """Return the bytes of /proc/meminfo by name; empty where there is no such file."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {w[0].rstrip(":"): int(w[1]) * 1024 for w in words if len(w) == 3}


def read_open_files() -> tuple[int, int] | None:
    """Return how many files a process may have open, and what it may raise that to."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def read_free_bytes(path: str) -> int | None:
    """Return the bytes that are free where a folder lies; None without the folder."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def find_address(name: str) -> str | None:
    """Return the address that a host's name stands for here; None for an unknown one."""
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def list_variables(environ: Mapping[str, str]) -> Rows:
    """Return the variables that change how jax compiles, runs and communicates, by name.

    Example:
      >>> from txcore.doctor import facts
      >>> facts.list_variables({"HOME": "/me", "XLA_FLAGS": "--x", "JAX_API_KEY": "abc"})
      [('JAX_API_KEY', '(not shown)'), ('XLA_FLAGS', '--x')]
    """
    rows: Rows = []
    for name in sorted(name for name in environ if name.startswith(_VARIABLES)):
        is_secret = any(word in name for word in _SECRETS)
        rows.append((name, "(not shown)" if is_secret else printable(environ[name])))
    return rows


def list_devices() -> Rows:
    """Return the backend and its devices by kind; starts the backend."""
    try:
        devices = jax.devices()
    except RuntimeError as error:
        return [("devices", f"none: {first_line(error)}")]
    kinds = Counter(device.device_kind for device in devices)
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    rows: Rows = [("backend", jax.default_backend()), ("devices", text)]
    if jax.process_count() > 1:
        local = f"{jax.local_device_count()} devices are those of rank {jax.process_index()}"
        rows.append(("processes", f"{jax.process_count()}; {local}"))
    return rows


def list_settings() -> Rows:
    """Return jax's settings that change what a program computes or how it is compiled."""
    found = _compat.program_settings()
    rows: Rows = [(name, str(found[name])) for name in _SETTINGS if name in found]
    folder = _compat.setting("jax_compilation_cache_dir")
    return [*rows, ("persistent compilation cache", str(folder or "none"))]


def list_options() -> Rows:
    """Return the XLA options that an engine's steps are compiled with on the default device.

    On a CPU they follow from its instructions too: those for matrices and half precision are named.
    """
    from txcore.kernels import compiler_options
    from txcore.kernels.common.compiler_options import cpu_features

    rows: Rows = []
    platform = jax.default_backend()
    if platform == "cpu":
        names = sorted(n for n in cpu_features() if re.match("avx2|avx512f|amx|.*bf16|.*fp16", n))
        rows.append(("instructions", " ".join(names) or "unknown"))
    for dtype in ("float32", "bfloat16"):
        options = compiler_options(platform, dtype)
        rows.append((dtype, ", ".join(f"{k}={v}" for k, v in options.items()) or "XLA's defaults"))
    return rows


def list_kernels() -> Rows:
    """Return which kernels would run on the default device for the main named shapes."""
    from txcore.kernels.dispatch import registry
    from txcore.kernels.dispatch.tuned import cache_path, fields_of
    from txcore.kernels.dispatch.tuning_file import TuningError, label_candidate
    from txcore.kernels.tuning.measure import problem_of
    from txcore.kernels.tuning.shapes import MAIN, SHAPES

    rows: Rows = [("tuning file", cache_path() or "none")]
    for name in MAIN:
        problem, kernels = problem_of(SHAPES[name], "float32")
        try:
            choice = registry.choose_implementation(problem, kernels, None)
        except TuningError as error:
            return [*rows, ("refused", first_line(error))]
        what = label_candidate(choice.implementation, fields_of(choice.config))
        rows.append((problem.op, name, what, choice.source))
    return rows
