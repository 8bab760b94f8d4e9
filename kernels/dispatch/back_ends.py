"""The names of implementations: each is a back end, which compiles for some platforms."""

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

Implementation = Literal[
    "xla", "pallas", "pallas_triton", "mosaic_gpu", "mosaic_tpu", "triton_ir", "jax_triton"
]

# None: every platform. Elsewhere a Pallas kernel can be interpreted, and the others cannot run.
PLATFORMS: Mapping[str, tuple[str, ...] | None] = {
    "xla": None,
    "pallas_triton": ("gpu",),  # Pallas by its Triton lowering, which jax deprecates since 0.11
    "mosaic_gpu": ("gpu",),  # Pallas' own language for Hopper, by Mosaic
    "mosaic_tpu": ("tpu",),  # Pallas by Mosaic
    "triton_ir": ("gpu",),  # Triton's intermediate representation, compiled by XLA itself
    "jax_triton": ("gpu",),  # Triton's language, by the package jax-triton
}
BACK_ENDS = tuple(PLATFORMS)
# "pallas" is the Pallas back end of the platform, as jax's pallas_call has one for each: a program
# that names it runs on TPUs and GPUs. Mosaic GPU has a call and a language of its own.
PALLAS = ("pallas_triton", "mosaic_tpu")
NAMES: tuple[str, ...] = get_args(Implementation)


def resolve_pallas(name: str, platform: str, known: Iterable[str]) -> str:
    """Return the back end that a name stands for, where one of an op's `known` back ends is it.

    Args:
      name: one of `NAMES`.
      platform: "cpu", "gpu", "tpu"; on CPU "pallas" is the op's first Pallas kernel, interpreted.
      known: the op's implementations.

    Returns:
      `name` itself, but of "pallas" the platform's Pallas back end; "pallas" where there is none.

    Example:
      >>> resolve_pallas("pallas", "tpu", ["xla", "pallas_triton", "mosaic_tpu"])
      'mosaic_tpu'
    """
    if name != "pallas":
        return name
    able = [n for n in PALLAS if n in known and platform in ("cpu", *(PLATFORMS[n] or ()))]
    return able[0] if able else name
