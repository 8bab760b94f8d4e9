"""Packing of many arrays in one launch, by a kernel written in Triton's own IR.

Pallas cannot select an array by its address: it can only branch to code that reads it. This kernel
selects: each program finds its array among the arguments, and all programs run the same copy. A
launch takes 256 arrays at most (CUDA limits the arguments to 4096 bytes), all of one dtype.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore import _compat
from txcore.kernels.bucket.derivatives import Dtypes, Shapes, make_buckets
from txcore.kernels.bucket.pallas import Config
from txcore.kernels.common import pallas_masked as masked
from txcore.kernels.dispatch.problem import Problem

ARRAYS = 256  # at most, in one launch
_TYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}


def list_configs(problem: Problem) -> Sequence[Config]:
    """Return the runs worth trying, the best guess first."""
    return Config(2048), Config(1024), Config(4096, warps=8)


def refuse_pack(problem: Problem) -> str | None:
    """Return why the kernel cannot pack these leaves, or None."""
    dtypes = (*problem.dtypes, problem.get_option("dtype"))
    return _explain_refusal(problem, dtypes, sum(map(prod, problem.shapes)))


def refuse_unpack(problem: Problem) -> str | None:
    """Return why the kernel cannot unpack this buffer, or None."""
    dtypes = (*problem.dtypes, *problem.get_option("dtypes"))
    return _explain_refusal(problem, dtypes, prod(problem.shapes[0]))


def _explain_refusal(problem: Problem, dtypes: Sequence[str], size: int) -> str | None:
    if problem.platform != "gpu":
        return f"its kernel is Triton's, and nothing compiles that for {problem.platform}"
    if not set(dtypes) <= set(_TYPES):
        return f"its kernel copies {', '.join(_TYPES)}, and got {', '.join(sorted(set(dtypes)))}"
    return masked.explain_too_large(size)


def _pack_leaves(
    leaves: tuple[jax.Array, ...], scale: tuple[jax.Array, ...], dtype: str, config: Config
) -> jax.Array:
    sizes = [leaf.size for leaf in leaves]
    buffer: tuple[jax.Array, ...] = ()
    for some in group_launches(sizes, [str(leaf.dtype) for leaf in leaves], ARRAYS):
        types = (str(leaves[some[0]].dtype), dtype, str(scale[0].dtype) if scale else "")
        arrays = [leaves[i].reshape(-1) for i in some]
        operands = (*arrays, *(x.reshape(1) for x in scale), *buffer)
        out = _compat.shape_like(leaves[0], (sum(sizes),), dtype)
        # The next launch fills more of the buffer: it is the last operand, and the result.
        aliases = {len(operands) - 1: 0} if buffer else {}
        buffer = tuple(
            _launch_kernel(
                "pack", sizes, some, types, config, operands, [out], aliases, spare=bool(buffer)
            )
        )
    return buffer[0] if buffer else jnp.zeros(0, dtype)


def _unpack_buffer(
    flat: jax.Array, scale: tuple[jax.Array, ...], shapes: Shapes, dtypes: Dtypes, config: Config
) -> list[jax.Array]:
    sizes = [prod(shape) for shape in shapes]
    made = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    for some in group_launches(sizes, dtypes, ARRAYS):
        types = (str(flat.dtype), dtypes[some[0]], str(scale[0].dtype) if scale else "")
        outs = [_compat.shape_like(flat, (sizes[i],), dtypes[i]) for i in some]
        operands = (flat, *(x.reshape(1) for x in scale))
        results = _launch_kernel("unpack", sizes, some, types, config, operands, outs, {})
        for i, array in zip(some, results, strict=True):
            made[i] = array.reshape(shapes[i])
    return made


def group_launches(sizes: Sequence[int], dtypes: Sequence[str], most: int) -> list[list[int]]:
    """Return which arrays each launch copies: `most` of one dtype, without the empty ones."""
    found = []
    for dtype in dict.fromkeys(dtypes):
        alike = [i for i, size in enumerate(sizes) if size and dtypes[i] == dtype]
        found += [alike[i : i + most] for i in range(0, len(alike), most)]
    return found


def _launch_kernel(
    op: str,
    sizes: Sequence[int],
    some: Sequence[int],
    types: tuple[str, str, str],
    config: Config,
    operands: tuple[jax.Array, ...],
    results: Sequence[jax.ShapeDtypeStruct],
    aliases: dict[int, int],
    spare: bool = False,
) -> Any:
    starts = [0, *accumulate(sizes)]
    parts = [(starts[i], sizes[i]) for i in some]
    programs = sum(-(-size // config.elements) for _, size in parts)
    call = jax.ffi.ffi_call(
        "__gpu$xla.gpu.triton",
        list(results),
        vmap_method="sequential",
        input_output_aliases=aliases,
    )
    attributes: dict[str, Any] = {
        "name": f"{op}_{len(parts)}",
        "ir": _write_module(op, parts, types, config.elements, spare),
        "num_stages": np.int32(1),
        "num_warps": np.int32(config.warps),
        "grid_x": np.int32(programs),
        "grid_y": np.int32(1),
        "grid_z": np.int32(1),
        "debug": False,
    }
    return call(*operands, **attributes)


def _write_module(
    op: str,
    parts: Sequence[tuple[int, int]],
    types: tuple[str, str, str],
    elements: int,
    spare: bool,
) -> str:
    """Write the kernel as the text of an MLIR module.

    Args:
      op: "pack" or "unpack".
      parts: start and size in the buffer of each array.
      types: the dtypes that are read, written, and of the scale ("" for none).
      elements: how many each program copies.
      spare: whether the argument before the last is the buffer that the result is an alias of;
        the kernel does not read it.
    """
    read, written = _TYPES[types[0]], _TYPES[types[1]]
    arrays, flat = (read, written) if op == "pack" else (written, read)
    names = [f"%a{i}: !tt.ptr<{arrays}> {{tt.divisibility = 16 : i32}}" for i in range(len(parts))]
    buffer = f"%flat: !tt.ptr<{flat}> {{tt.divisibility = 16 : i32}}"
    scale = [f"%scale: !tt.ptr<{_TYPES[types[2]]}>"] if types[2] else []
    given = [f"%given: !tt.ptr<{flat}>"] if spare else []
    arguments = [*names, *scale, *given, buffer] if op == "pack" else [buffer, *scale, *names]
    lines = [
        *_write_choice(parts, arrays, elements),
        # A full run is copied without a mask: with one, a thread cannot load 16 bytes at a time.
        "%full = arith.cmpi sge, %left, %elements : i32",
        "scf.if %full {",
        *_write_copy(op, types, elements, whole=True),
        "} else {",
        *_write_copy(op, types, elements, whole=False),
        "}",
    ]
    body = "\n".join(f"    {line}" for line in lines)
    name = f"{op}_{len(parts)}"
    return (
        f"module {{\n  tt.func public @{name}({', '.join(arguments)}) "
        f"attributes {{noinline = false}} {{\n{body}\n    tt.return\n  }}\n}}\n"
    )


def _write_choice(parts: Sequence[tuple[int, int]], dtype: str, elements: int) -> list[str]:
    """Write how a program finds its array, the array's size and start, and its own run of it."""
    pointer = f"!tt.ptr<{dtype}>"
    lines = [
        "%program = tt.get_program_id x : i32",
        f"%elements = arith.constant {elements} : i32",
        f"%start0 = arith.constant {parts[0][0]} : i32",
        f"%size0 = arith.constant {parts[0][1]} : i32",
        "%first0 = arith.constant 0 : i32",
    ]
    pointer_name, first = "%a0", 0
    for i, (start, size) in enumerate(parts[1:], 1):
        first += -(-parts[i - 1][1] // elements)
        lines += [
            f"%s{i} = arith.constant {start} : i32",
            f"%n{i} = arith.constant {size} : i32",
            f"%f{i} = arith.constant {first} : i32",
            f"%c{i} = arith.cmpi sge, %program, %f{i} : i32",
            f"%p{i} = arith.select %c{i}, %a{i}, {pointer_name} : {pointer}",
            f"%start{i} = arith.select %c{i}, %s{i}, %start{i - 1} : i32",
            f"%size{i} = arith.select %c{i}, %n{i}, %size{i - 1} : i32",
            f"%first{i} = arith.select %c{i}, %f{i}, %first{i - 1} : i32",
        ]
        pointer_name = f"%p{i}"
    last = len(parts) - 1
    return [
        *lines,
        f"%run = arith.subi %program, %first{last} : i32",
        "%offset = arith.muli %run, %elements : i32",
        f"%target = arith.addi %offset, %start{last} : i32",
        f"%array = tt.addptr {pointer_name}, %offset : {pointer}, i32",
        f"%left = arith.subi %size{last}, %offset : i32",
    ]


def _write_copy(op: str, types: tuple[str, str, str], elements: int, *, whole: bool) -> list[str]:
    """Write the copy of one run between an array and the buffer, cast and scaled."""
    read, written, scale = (_TYPES.get(dtype, "") for dtype in types)
    flat = written if op == "pack" else read
    mask = "" if whole else ", %inside"
    source, target = ("%array", "%part") if op == "pack" else ("%part", "%array")

    def tensor_of(dtype: str) -> str:
        return f"tensor<{elements}x{dtype}>"

    lines = [
        f"%part = tt.addptr %flat, %target : !tt.ptr<{flat}>, i32",
        f"%place = tt.make_range {{end = {elements} : i32, start = 0 : i32}} : {tensor_of('i32')}",
        f"%lefts = tt.splat %left : i32 -> {tensor_of('i32')}",
        f"%inside = arith.cmpi slt, %place, %lefts : {tensor_of('i32')}",
        f"%from0 = tt.splat {source} : !tt.ptr<{read}> -> {tensor_of(f'!tt.ptr<{read}>')}",
        f"%from = tt.addptr %from0, %place : {tensor_of(f'!tt.ptr<{read}>')}, {tensor_of('i32')}",
        f"%x0 = tt.load %from{mask} : {tensor_of(f'!tt.ptr<{read}>')}",
    ]
    name, dtype = "%x0", read
    if scale:
        cast, name = _write_cast(name, "%x1", dtype, scale, tensor_of)
        lines += [
            *cast,
            f"%factor = tt.load %scale : !tt.ptr<{scale}>",
            f"%factors = tt.splat %factor : {scale} -> {tensor_of(scale)}",
            f"%x2 = arith.mulf {name}, %factors : {tensor_of(scale)}",
        ]
        name, dtype = "%x2", scale
    if {dtype, written} == {"f16", "bf16"}:  # neither can hold all of the other's numbers
        cast, name = _write_cast(name, "%x3", dtype, "f32", tensor_of)
        lines, dtype = [*lines, *cast], "f32"
    cast, name = _write_cast(name, "%x4", dtype, written, tensor_of)
    return [
        *lines,
        *cast,
        f"%to0 = tt.splat {target} : !tt.ptr<{written}> -> {tensor_of(f'!tt.ptr<{written}>')}",
        f"%to = tt.addptr %to0, %place : {tensor_of(f'!tt.ptr<{written}>')}, {tensor_of('i32')}",
        f"tt.store %to, {name}{mask} : {tensor_of(f'!tt.ptr<{written}>')}",
    ]


def _write_cast(name: str, made: str, old: str, new: str, tensor_of: Any) -> tuple[list[str], str]:
    """Write a cast between dtypes of different sizes; return no line where they are equal."""
    if old == new:
        return [], name
    bits = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
    cast = "extf" if bits[new] > bits[old] else "truncf"
    return [f"{made} = arith.{cast} {name} : {tensor_of(old)} to {tensor_of(new)}"], made


pack, unpack = make_buckets(_pack_leaves, _unpack_buffer)
