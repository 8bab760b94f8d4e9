"""Calls of kernels in Triton's language, by the package jax-triton: only on GPUs."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from math import prod
from typing import Any

import jax

from txcore import _compat, varying
from txcore.kernels.common import pallas_masked as masked
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem

# Others pass the results that take an operand's memory in another way.
SERIES = "0.3"
DTYPES = ("float16", "bfloat16", "float32")
# jax-triton asks the driver, which is not there where a program is compiled for an absent GPU.
_CAPABILITIES = {"A100": 80, "H100": 90, "H200": 90}


def explain_refusal(problem: Problem, *results: str, sizes: Sequence[int] = ()) -> str | None:
    """Return why no kernel in Triton's language can compute a problem, or None.

    Args:
      problem: what to compute.
      *results: the dtypes of its results.
      sizes: of the arrays that it needs beside its operands.
    """
    if problem.platform != "gpu":
        return f"its kernel is Triton's, and nothing compiles that for {problem.platform}"
    given = sorted({dtype for dtype in (*problem.dtypes, *results) if dtype not in DTYPES})
    if given:
        return f"its kernel computes in {', '.join(DTYPES)}, and got {', '.join(given)}"
    version = _find_version("jax-triton")
    if version is None:
        return "its kernel needs the package jax-triton (pip install 'txcore[triton]')"
    if not version.startswith(f"{SERIES}."):
        return f"its kernel needs jax-triton {SERIES}, and {version} is installed"
    return masked.explain_too_large(*map(prod, problem.shapes), *sizes)


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def call_kernel(
    kernel: Any,
    grid: tuple[int, ...],
    results: Sequence[tuple[int, Any]],
    *operands: jax.Array,
    warps: int,
    stages: int = 1,
    aliases: Mapping[int, int] | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Run a kernel in Triton's language on flat arrays; under `vmap`, one launch after the other.

    Args:
      kernel: a function that `triton.jit` decorates; it takes a pointer to each operand and then to
        each result, and the constants.
      grid: the number of programs along each dim.
      results: the size and dtype of each result.
      *operands: arrays that vary along the same mesh axes; a scalar is an array of one element.
      warps: of a program.
      stages: how many loop steps have their loads in flight at once.
      aliases: operand number -> number of the result that takes its memory.
      **constants: what the kernel is compiled for; None for a pointer that is left out.

    Returns:
      The results, flat.
    """

    def launch(*flat: jax.Array) -> list[jax.Array]:
        return launch_kernel(
            kernel,
            grid,
            [_compat.shape_like(flat[0], (size,), dtype) for size, dtype in results],
            *flat,
            num_warps=warps,
            num_stages=stages,
            input_output_aliases=dict(aliases or {}),
            **constants,
        )

    # jax-triton has no rule for vmap.
    launch_each = jax.custom_batching.sequential_vmap(launch)
    return varying.run_untracked(launch_each, *(x.reshape(-1) for x in operands))  # type: ignore[no-any-return]


def launch_kernel(
    kernel: Any, grid: tuple[int, ...], results: Sequence[Any], *operands: jax.Array, **options: Any
) -> list[jax.Array]:
    """Launch a kernel by jax-triton, as `call_kernel` does; tests interpret it here."""
    import jax_triton

    return jax_triton.triton_call(  # type: ignore[no-any-return]
        *operands,
        kernel=kernel,
        out_shape=list(results),
        grid=grid,
        compute_capability=_find_capability(),
        **options,
    )


def _find_capability() -> int | None:
    """Return the compute capability of an absent GPU; None for a GPU that is here."""
    kind = registry.current_device()[1]
    if jax.default_backend() == "gpu":
        return None
    found = [number for name, number in _CAPABILITIES.items() if name in kind]
    if not found:
        raise NotImplementedError(
            "to compile Triton's language for a GPU that is not here, its device kind needs one of "
            f"{', '.join(_CAPABILITIES)}, got {kind!r}: compile on that GPU, or by 'pallas'"
        )
    return found[0]
