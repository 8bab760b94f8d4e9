"""How to compile a program that uses these kernels."""

import functools
import os
import pathlib
import re

_CPU_INFO = pathlib.Path("/proc/cpuinfo")
_YNN = "xla_cpu_experimental_ynn_fusion_type"
_SUMS, _PRODUCTS = "LIBRARY_FUSION_TYPE_REDUCE", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


def compiler_options(platform: str, dtype: str = "float32") -> dict[str, str]:
    """Return the compiler options with which these kernels run fastest on a platform.

    On CPU, XLA hands to the YNN library sums and maxima alone. Its own loops take up to seven times
    as long for those; of all that the library offers, convolutions' filter gradients would take up
    to four times as long there, and products in float32 gain nothing. Products in bfloat16 are
    handed over where the processor multiplies matrices (AMX): there XLA's own reach a sixth of
    their rate. Without AMX they would be slower.

    On GPU they let two collectives be under way at a time, in place of one: of the two directions
    of a ring (`tx.tensor.column_dense(overlap=True)`) one would be waited for.

    The options belong to one compiled function; no environment variable is changed, and an option
    that XLA_FLAGS names is left out, so that the value there holds.

    Args:
      platform: a jax platform name, such as "cpu", "cuda" or "tpu".
      dtype: the dtype in which the function computes.

    Returns:
      Options for `jax.jit(f, compiler_options=...)` or `lowered.compile(...)`; empty where none
      are known to help.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> options = kernels.compiler_options(jax.default_backend())
      >>> float(jax.jit(jnp.sin, compiler_options=options)(0.0))
      0.0
    """
    options = {}
    if platform in ("gpu", "cuda"):
        options = {"xla_gpu_experimental_parallel_collective_overlap_limit": "2"}
    elif platform == "cpu":
        multiplies = dtype == "bfloat16" and "amx_bf16" in cpu_features()
        options = {_YNN: f"{_SUMS},{_PRODUCTS}" if multiplies else _SUMS}
    given = re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", ""))
    return {name: value for name, value in options.items() if name not in given}


@functools.cache
def cpu_features() -> frozenset[str]:
    """Return what this machine's processor says it can do, such as "avx2" or "amx_bf16".

    Empty where there is no /proc/cpuinfo.
    """
    try:
        text = _CPU_INFO.read_text(errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split() if found else ())
