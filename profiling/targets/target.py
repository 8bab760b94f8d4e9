"""`Target`: what "tpu:v5p:16x16x16", "cuda:h100:64x8" and "cpu:8" name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from txcore.profiling.targets.chips import CHIPS, Chip
from txcore.profiling.targets.devices import cpu_devices, gpu_devices, tpu_devices, tpu_grid

MOST_DEVICES = 1 << 16  # each is described to the compiler
_DIGITS = 9
_FORMS = "'tpu:v5p:16x16x16', 'cuda:h100:64x8' (hosts x GPUs) or 'cpu:8'"


@dataclass(frozen=True)
class Target:
    """A machine to compile for, which may be absent; `parse_target` makes it.

    Attributes:
      name: as given, "tpu:v5p:16x16x16".
      platform: "tpu", "cuda" or "cpu".
      shape: chips along each dim of a TPU slice; hosts and GPUs in each; CPU devices.
      chip: the chip's peaks; None for a CPU.
    """

    name: str
    platform: str
    shape: tuple[int, ...]
    chip: Chip | None = None

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.shape)

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        """The devices: of a CPU target this process's own, else good for compiling only.

        Raises:
          ImportError: the platform's compiler is not installed.
          RuntimeError: it does not work with this jax, or there are too few CPU devices.
        """
        if self.platform == "tpu":
            return tpu_devices(self.name)
        return gpu_devices(self.name) if self.platform == "cuda" else cpu_devices(self.name)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """XLA's options without which this target does not compile (autotuning runs kernels)."""
        return {"xla_gpu_autotune_level": 0} if self.platform == "cuda" else {}

    @property
    def rewrites_collectives(self) -> bool:
        """Whether the compiler makes other collectives of a program's own.

        That for TPUs does. The module right after SPMD partitioning explains them: whoever keeps
        it compiles once, and else twice.
        """
        return self.platform == "tpu"

    def mesh(self, sizes: Mapping[str, int]) -> Mesh:
        """Arrange the devices in a mesh whose axes follow the machine's network.

        Args:
          sizes: size of each axis by name, `{"data": 512, "model": 8}`; the last axis gets the
            nearest devices: those of a host of GPUs, neighbours in a TPU's torus.

        Returns:
          The mesh; its axes have jax's type Auto.

        Raises:
          ValueError: there is no axis, or the sizes do not multiply to the number of devices.
          ImportError, RuntimeError: as for `devices`.
        """
        shape = tuple(sizes.values())
        if not sizes or min(shape) < 1 or math.prod(shape) != self.size:
            given = ",".join(f"{name}={size}" for name, size in sizes.items()) or "no axis"
            raise ValueError(
                f"a mesh on {self.name} needs axes whose sizes multiply to its {self.size} "
                f"devices, got {given} = {math.prod(shape)}: change the mesh or the target"
            )
        grid = np.array(self.devices, dtype=object).reshape(shape)
        if self.platform == "tpu":
            grid = tpu_grid(self.devices, shape)
        return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def parse_target(text: str) -> Target:
    """Read the name of a target.

    Args:
      text: "tpu:CHIP:AxBxC" (chips along each dim of the slice), "cuda:CHIP:N" or
        "cuda:CHIP:HxN" (hosts x GPUs), "cpu:N".

    Returns:
      The target. Nothing is loaded yet.

    Raises:
      ValueError: no such platform, chip or shape.
      TypeError: it is no text.

    Example:
      >>> parse_target("cuda:h200:64x8").size, parse_target("tpu:v5p:16x16x16").size
      (512, 4096)
    """
    if not isinstance(text, str):
        raise TypeError(f"a target needs to be text as {_FORMS}, got a {type(text).__name__}")
    platform, *rest = text.split(":")
    if platform == "cpu" and len(rest) == 1:
        return Target(text, platform, _parse_shape(text, rest[0], 1))
    if platform not in CHIPS or len(rest) != 2:
        raise ValueError(f"a target needs to be as {_FORMS}, got {text[:60]!r}")
    name, sizes = rest
    chip = CHIPS[platform].get(name)
    if chip is None:
        known = ", ".join(f"{platform}:{name}" for name in CHIPS[platform])
        raise ValueError(f"a target needs a known chip, got {text[:60]!r}: use one of {known}")
    if platform == "cuda":
        return Target(text, platform, _parse_hosts(text, sizes, chip), chip)
    shape = _parse_shape(text, sizes, chip.links // 2)  # a torus has two links along each dim
    if math.prod(shape) > chip.linked:
        raise ValueError(
            f"a slice of {name} needs at most {chip.linked} chips, got {math.prod(shape)} in "
            f"{text!r}: use a smaller shape"
        )
    return Target(text, platform, shape, chip)


def _parse_hosts(text: str, sizes: str, chip: Chip) -> tuple[int, ...]:
    shape = _parse_shape(text, sizes, 2) if "x" in sizes else (1, *_parse_shape(text, sizes, 1))
    if shape[1] > chip.linked:
        raise ValueError(
            f"a host of {chip.name} needs at most {chip.linked} GPUs, got {shape[1]} in {text!r}: "
            f"write hosts x GPUs, as cuda:{chip.name}:2x8"
        )
    return shape


def _parse_shape(text: str, sizes: str, dims: int) -> tuple[int, ...]:
    parts = sizes.split("x")
    numbers = [int(p) for p in parts if p.isdecimal() and len(p) <= _DIGITS]
    if len(parts) != dims or len(numbers) != dims or not all(numbers):
        needed = "x".join("ABC"[:dims]) if dims > 1 else "N"
        raise ValueError(
            f"the target {text[:60]!r} needs a shape {needed} of positive numbers, got "
            f"{sizes[:40]!r}: write targets as {_FORMS}"
        )
    if math.prod(numbers) > MOST_DEVICES:
        raise ValueError(
            f"a target needs at most {MOST_DEVICES} devices, got {math.prod(numbers)} in "
            f"{text!r}: use a smaller shape"
        )
    return tuple(numbers)
