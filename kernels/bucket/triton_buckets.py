"""Packing and unpacking in Triton's language. Importing this needs the package triton.

A kernel has a fixed number of arguments: as many arrays as `ARRAYS` says, of one dtype. A program
finds its array by its number, selects the pointer to it, and copies a run of it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import triton
import triton.language as tl

ARRAYS = 32


@triton.jit
def pack(
    a0,
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    a8,
    a9,
    a10,
    a11,
    a12,
    a13,
    a14,
    a15,
    a16,
    a17,
    a18,
    a19,
    a20,
    a21,
    a22,
    a23,
    a24,
    a25,
    a26,
    a27,
    a28,
    a29,
    a30,
    a31,
    scale_ptr,
    given_ptr,  # where the launches before have packed: the result takes its memory
    flat_ptr,
    table: tl.constexpr,
    elements: tl.constexpr,
    scaled: tl.constexpr,
):
    """Copy a run of one array into the buffer; `table` has (first program, start, size) of each."""
    arrays = (
        a0,
        a1,
        a2,
        a3,
        a4,
        a5,
        a6,
        a7,
        a8,
        a9,
        a10,
        a11,
        a12,
        a13,
        a14,
        a15,
        a16,
        a17,
        a18,
        a19,
        a20,
        a21,
        a22,
        a23,
        a24,
        a25,
        a26,
        a27,
        a28,
        a29,
        a30,
        a31,
    )
    array, start, left = _select_run(arrays, table, elements)
    _copy(array, flat_ptr + start, left, scale_ptr, scaled, elements)


@triton.jit
def unpack(
    flat_ptr,
    scale_ptr,
    a0,
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    a8,
    a9,
    a10,
    a11,
    a12,
    a13,
    a14,
    a15,
    a16,
    a17,
    a18,
    a19,
    a20,
    a21,
    a22,
    a23,
    a24,
    a25,
    a26,
    a27,
    a28,
    a29,
    a30,
    a31,
    table: tl.constexpr,
    elements: tl.constexpr,
    scaled: tl.constexpr,
):
    """Copy a run of the buffer into one array; `table` as for `pack`."""
    arrays = (
        a0,
        a1,
        a2,
        a3,
        a4,
        a5,
        a6,
        a7,
        a8,
        a9,
        a10,
        a11,
        a12,
        a13,
        a14,
        a15,
        a16,
        a17,
        a18,
        a19,
        a20,
        a21,
        a22,
        a23,
        a24,
        a25,
        a26,
        a27,
        a28,
        a29,
        a30,
        a31,
    )
    array, start, left = _select_run(arrays, table, elements)
    _copy(flat_ptr + start, array, left, scale_ptr, scaled, elements)


@triton.jit
def _select_run(arrays, table: tl.constexpr, elements: tl.constexpr):
    """Return a pointer to this program's run, its place in the buffer, and what is left from it."""
    program = tl.program_id(0)
    array = arrays[0]
    run = program
    start = table[0][1]
    size = table[0][2]
    for i in tl.static_range(1, len(table)):
        is_here = program >= table[i][0]
        array = tl.where(is_here, arrays[i], array)
        run = tl.where(is_here, program - table[i][0], run)
        start = tl.where(is_here, table[i][1], start)
        size = tl.where(is_here, table[i][2], size)
    offset = run * elements
    return array + offset, start + offset, size - offset


@triton.jit
def _copy(source, target, left, scale_ptr, scaled: tl.constexpr, elements: tl.constexpr):
    """Copy a run, scaled and cast. With a mask, a thread cannot load 16 bytes at a time."""
    place = tl.arange(0, elements)
    if left >= elements:
        x = _scale(tl.load(source + place), scale_ptr, scaled)
        tl.store(target + place, x.to(target.dtype.element_ty))
    else:
        x = _scale(tl.load(source + place, mask=place < left), scale_ptr, scaled)
        tl.store(target + place, x.to(target.dtype.element_ty), mask=place < left)


@triton.jit
def _scale(x, scale_ptr, scaled: tl.constexpr):
    if scaled:
        return x.to(tl.float32) * tl.load(scale_ptr)
    else:
        return x
