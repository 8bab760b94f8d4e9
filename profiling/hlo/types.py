"""Array types as HLO prints them: `f32[8,4]{1,0}`, tuples of them, and their bytes."""

import functools
import math
import re
from dataclasses import dataclass

from txcore.errors import TxcoreError
from txcore.profiling.hlo.scan import without_comments


class HloError(TxcoreError, ValueError):
    """A line of HLO text that looks like a collective and cannot be read."""


MOST = 10**18  # XLA counts in int64; larger numbers are reported as "over 10^18"
_DIGITS = 18

# HLO's name of each element type: (jax's name, bits of one element).
_DTYPES: dict[str, tuple[str, int]] = {
    "pred": ("bool", 8),
    "token": ("token", 0),
    "opaque": ("opaque", 0),
    "bf16": ("bfloat16", 16),
    "c64": ("complex64", 64),
    "c128": ("complex128", 128),
    **{f"f{bits}": (f"float{bits}", bits) for bits in (16, 32, 64)},
    **{f"s{bits}": (f"int{bits}", bits) for bits in (1, 2, 4, 8, 16, 32, 64)},
    **{f"u{bits}": (f"uint{bits}", bits) for bits in (1, 2, 4, 8, 16, 32, 64)},
}
# float8_e4m3fn prints as f8e4m3fn, float4_e2m1fn as f4e2m1fn.
_SMALL_FLOAT = re.compile(r"f([468])(e\d++m\d\w*+)")
_ARRAY = re.compile(r"(?<!\w)([a-z]\w*+)\[([^\[\]]*+)\]")


@dataclass(frozen=True, slots=True)
class Shape:
    """One array type: `dtype` is jax's name ("float32"), `bits` the bits of one element."""

    dtype: str
    dims: tuple[int, ...]
    bits: int

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Return the bytes that the elements fill, sub-byte types packed."""
        return -(-self.elements * self.bits // 8)


def to_int(digits: str) -> int:
    """Read a number of any length; every number above `MOST` reads as `MOST` + 1."""
    digits = digits.lstrip("0") if len(digits) > _DIGITS else digits
    return int(digits or "0") if len(digits) <= _DIGITS else MOST + 1


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Read a printed type and return its arrays, a tuple's from left to right.

    Raises:
      HloError: the text holds no array type, or one with an unknown element type or dim.

    Example:
      >>> [(s.dtype, s.dims) for s in parse_shapes("(f32[8,4]{1,0}, bf16[])")]
      [('float32', (8, 4)), ('bfloat16', ())]
    """
    found = _ARRAY.findall(without_comments(text))
    if not found:
        raise HloError(f"no array type in {text[:60]!r}")
    return tuple(_read_shape(name, dims) for name, dims in found)


@functools.lru_cache(maxsize=1024)
def _read_shape(name: str, dims: str) -> Shape:
    dtype, bits = _dtype_and_bits(name)
    # A bounded dynamic dim prints as <=8: the bound is what is allocated and sent.
    sizes = [d.strip().removeprefix("<=") for d in dims.split(",") if d.strip()]
    if not all(size.isdecimal() for size in sizes):
        raise HloError(f"no dims in {name[:20]}[{dims[:40]}]")
    elements = 1
    for size in sizes:
        elements *= to_int(size)
        if elements * bits > 8 * MOST:
            raise HloError(f"more than 10^18 bytes in {name[:20]}[{dims[:40]}]")
    return Shape(dtype, tuple(map(to_int, sizes)), bits)


def _dtype_and_bits(name: str) -> tuple[str, int]:
    if known := _DTYPES.get(name):
        return known
    if small := _SMALL_FLOAT.fullmatch(name):
        return f"float{small[1]}_{small[2]}", int(small[1])
    raise HloError(f"unknown element type {name[:40]!r}")
