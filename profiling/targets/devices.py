"""The devices of a target: real ones on CPU, else descriptions that only compilers need."""

import functools
import glob
import os
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from txcore import _compat
from txcore.profiling.targets.gpu import target_config

# libtpu looks for a TPU machine when it is loaded. Where there is none, these say so: without
# them it asks a metadata server, warns of what it cannot find, and refuses a second process.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@functools.cache
def tpu_devices(target: str) -> tuple[jax.Device, ...]:
    """Return the devices of a TPU target."""
    _check_libtpu(target)
    if not _has_tpu():
        for name, value in _NO_TPU_HERE.items():
            os.environ.setdefault(name, value)
    chip, shape = target.split(":")[1:]
    # A v4 chip has two cores, which programs use as one device since "megacore".
    options = {"chip_config_name": "megacore"} if chip == "v4" else {}
    return _devices_of_topology(target, "tpu", f"{chip}:{shape}", **options)


@functools.cache
def gpu_devices(target: str) -> tuple[jax.Device, ...]:
    """Return the devices of a GPU target."""
    _check_cuda_plugin(target)
    chip, shape = target.split(":")[1:]
    hosts = shape if "x" in shape else f"1x{shape}"
    return _devices_of_topology(
        target, "cuda", "", topology=f"1x{hosts}", target_config=target_config(chip)
    )


def cpu_devices(target: str) -> tuple[jax.Device, ...]:
    """Return the first CPU devices of this process: jax cannot compile for absent ones."""
    needed, devices = int(target.split(":")[1]), jax.devices("cpu")
    if needed > len(devices):
        raise RuntimeError(
            f"the target {target!r} needs {needed} CPU devices, but this process has "
            f"{len(devices)}: before jax's first use call "
            f'jax.config.update("jax_num_cpu_devices", {needed})'
        )
    return tuple(devices[:needed])


def tpu_grid(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """Arrange TPU chips so that the axes of a mesh are lines and blocks of the torus."""
    from jax.experimental import mesh_utils

    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _devices_of_topology(
    target: str, platform: str, name: str, **options: Any
) -> tuple[jax.Device, ...]:
    from jax.experimental import topologies

    if not (_compat.setting("jax_platforms") or _compat.backend_started() or _has_accelerator()):
        # jax would try to use the devices that the compilers' packages promise, complain at
        # length, and drop the GPU plugin, its compiler with it.
        jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(platform=platform, topology_name=name, **options)
    except NotImplementedError as error:
        raise RuntimeError(
            f"jax does not offer the compiler for the target {target!r} ({error}): set "
            "JAX_PLATFORMS=cpu before it starts, since on a machine without GPUs it else drops "
            "the GPU plugin"
        ) from error
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise RuntimeError(f"the compiler for the target {target!r} says: {first}") from error
    return tuple(found.devices)


def _has_accelerator() -> bool:
    return _has_tpu() or bool(glob.glob("/dev/nvidia*"))


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))


def _check_libtpu(target: str) -> None:
    have = _installed_version("libtpu")
    if have is None:
        raise ImportError(
            f"the target {target!r} needs the package libtpu, which is not installed: "
            "pip install 'txcore[tpu-target]'"
        )
    # jax names the one that it works with in its extra: "libtpu==0.0.42.*; extra == 'tpu'".
    pinned = " ".join(r for r in metadata.requires("jax") or () if "libtpu" in r)
    wanted = re.search(r"libtpu==([\d.]+)\.\*", pinned)
    if wanted and not f"{have}.".startswith(f"{wanted[1]}."):
        raise ImportError(
            f"the target {target!r} needs libtpu {wanted[1]}.* beside jax {jax.__version__}, but "
            f"{have} is installed: pip install 'txcore[tpu-target]'"
        )


def _check_cuda_plugin(target: str) -> None:
    wanted = metadata.version("jaxlib")
    for cuda in ("12", "13"):
        have = {
            _installed_version(f"jax-cuda{cuda}-plugin"),
            _installed_version(f"jax-cuda{cuda}-pjrt"),
        }
        if have == {wanted}:
            return
        if have != {None}:
            raise ImportError(
                f"the target {target!r} needs jax-cuda{cuda}-plugin and jax-cuda{cuda}-pjrt "
                f"{wanted}, as jaxlib, but found {' and '.join(sorted(map(str, have)))}: "
                "pip install 'txcore[gpu-target]'"
            )
    raise ImportError(
        f"the target {target!r} needs the packages jax-cuda12-plugin and jax-cuda12-pjrt, which "
        "are not installed: pip install 'txcore[gpu-target]'"
    )


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
