"""Limits of a machine that end runs, or make them slow, with what to do about each."""

import ipaddress
import socket
from collections.abc import Iterator
from typing import NamedTuple

import jax

from txcore import _compat
from txcore.doctor import facts

_FILES = 1024  # a rank holds sockets to all others, and files of checkpoints
_MEMORY = 1 << 30
_SHARED = 1 << 29  # NCCL's buffers between the GPUs of a host


class Finding(NamedTuple):
    """What is short, and what to do."""

    what: str
    do: str


def find_limits() -> Iterator[Finding]:
    """Yield what this machine or its settings are short of; needs the backend.

    Example:
      >>> from txcore import doctor
      >>> all(finding.do for finding in doctor.find_limits())
      True
    """
    yield from check_files(facts.read_open_files())
    yield from check_memory(facts.read_memory().get("MemAvailable"))
    yield from check_cores(facts.count_cores(), jax.default_backend(), jax.local_device_count())
    if jax.default_backend() == "gpu" and jax.local_device_count() > 1:
        yield from check_shared_memory(facts.read_free_bytes("/dev/shm"))
    yield from check_address(facts.find_address(socket.gethostname()))
    yield from check_generator(str(_compat.program_settings().get("jax_default_prng_impl")))


def check_files(files: tuple[int, int] | None) -> Iterator[Finding]:
    """Yield a finding where a process may open too few files.

    Example:
      >>> from txcore.doctor import limits
      >>> [finding.do for finding in limits.check_files((256, 4096))]
      ['ulimit -n 4096']
    """
    if files is not None and 0 <= files[0] < _FILES:
        yield Finding(
            f"a process may open {files[0]} files, and a rank with many peers needs more",
            f"ulimit -n {files[1]}",
        )


def check_memory(available: int | None) -> Iterator[Finding]:
    """Yield a finding where little memory is left."""
    if available is not None and available < _MEMORY:
        yield Finding(
            f"{available / 2**20:.0f} MiB of memory are available: compiling a step may be ended "
            "by the kernel",
            "end other programs, or take a machine with more",
        )


def check_cores(cores: int, backend: str, devices: int) -> Iterator[Finding]:
    """Yield a finding where simulated devices share cores.

    Example:
      >>> from txcore.doctor import limits
      >>> [finding.what for finding in limits.check_cores(2, "cpu", 8)]
      ['8 simulated devices share 2 cores: results are right, times mean little']
    """
    if backend == "cpu" and devices > cores:
        yield Finding(
            f"{devices} simulated devices share {cores} cores: results are right, times mean "
            "little",
            f"measure with --devices {cores} or fewer",
        )


def check_shared_memory(free: int | None) -> Iterator[Finding]:
    """Yield a finding where the GPUs of a host have little shared memory."""
    if free is not None and free < _SHARED:
        yield Finding(
            f"{free / 2**20:.0f} MiB of shared memory are free, in which NCCL exchanges between "
            "the GPUs of a host",
            "give the container more: docker run --shm-size=1g",
        )


def check_address(address: str | None) -> Iterator[Finding]:
    """Yield a finding where other hosts cannot reach this one by the address of its name.

    Example:
      >>> from txcore.doctor import limits
      >>> [finding.do for finding in limits.check_address("127.0.1.1")]
      ['name an address that they see: txcore launch --coordinator ADDRESS:PORT']
    """
    if address is None or ipaddress.ip_address(address).is_loopback:
        yield Finding(
            f"this host's name stands for {address or 'no address'} here, where other hosts "
            "cannot reach rank 0",
            "name an address that they see: txcore launch --coordinator ADDRESS:PORT",
        )


def check_generator(name: str) -> Iterator[Finding]:
    """Yield a finding where random bits depend on how a program is sharded."""
    if "rbg" in name:
        yield Finding(
            f"jax_default_prng_impl is {name!r}, whose bits depend on the compiler and on the "
            "sharding",
            "take threefry2x32 where runs are compared; txcore's own keys are threefry's",
        )
