"""Array types as HLO prints them: `f32[8,4]{1,0}`, tuples of them, and their bytes."""

import math
import re
from dataclasses import dataclass


class HloError(ValueError):
    """A line of HLO text that looks like a collective and cannot be read."""


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
_SMALL_FLOAT = re.compile(r"f([468])(e\d+m\d+\w*)")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\[\]]*)\]")
_ANY_BRACKET = re.compile(r"[()\[\]{}]")
_COMMENT = re.compile(r"/\*.*?\*/")


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


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Read a printed type and return its arrays, a tuple's from left to right.

    Raises:
      HloError: the text holds no array type, or one with an unknown element type or dim.

    Example:
      >>> [(s.dtype, s.dims) for s in parse_shapes("(f32[8,4]{1,0}, bf16[])")]
      [('float32', (8, 4)), ('bfloat16', ())]
    """
    found = _ARRAY.findall(_COMMENT.sub("", text))
    if not found:
        raise HloError(f"no array type in {text[:60]!r}")
    return tuple(_shape(name, dims) for name, dims in found)


def _shape(name: str, dims: str) -> Shape:
    dtype, bits = _dtype(name)
    try:
        # A bounded dynamic dim prints as <=8: the bound is what is allocated and sent.
        sizes = tuple(int(d.strip().removeprefix("<=")) for d in dims.split(",") if d.strip())
    except ValueError:
        raise HloError(f"no dims in {name}[{dims[:40]}]") from None
    return Shape(dtype, sizes, bits)


def _dtype(name: str) -> tuple[str, int]:
    if known := _DTYPES.get(name):
        return known
    if small := _SMALL_FLOAT.fullmatch(name):
        return f"float{small[1]}_{small[2]}", int(small[1])
    raise HloError(f"unknown element type {name!r}")


def split_outside(text: str, separator: str) -> list[str]:
    """Split a text at the separators that are outside of all brackets; drop empty parts."""
    if not _ANY_BRACKET.search(text):
        return [p.strip() for p in text.split(separator) if p.strip()]
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == separator and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [p for p in [*parts, text[start:].strip()] if p]
