"""Read what besides its code changes a program's results: jax's settings and compiler flags."""

import os
from pathlib import Path

from txcore import _compat

# Variables that hold compiler flags, and those that the GPU's libraries read themselves.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
VARIABLES = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
MOST_BYTES = 1 << 20  # of a file with flags

# Flags that change no result; jax leaves the same ones out of its compilation cache's key
# (jax/_src/cache_key.py).
HARMLESS_FLAGS = frozenset(
    [
        "xla_force_host_platform_device_count",
        "xla_hlo_profile",
        "xla_gpu_cuda_data_dir",
        "xla_gpu_experimental_autotune_cache_mode",
        "xla_gpu_per_fusion_autotune_cache_dir",
        "xla_tpu_sdc_checker_streamz_metric",
        "xla_tpu_sdc_checker_enable_sdc_event_callbacks",
        "xla_tpu_sdc_checker_enable_coresweep_ng_callbacks",
        "xla_tpu_sdc_checker_no_logging_if_callbacks_are_present",
        "xla_tpu_compiler_variant",
    ]
)
HARMLESS_PREFIXES = ("xla_dump_",)


def program_settings() -> list[str]:
    """Return jax's settings that change a program or its results, a line for each.

    Example:
      >>> from txcore.launch import settings
      >>> [line for line in settings.program_settings() if "enable_x64" in line]
      ['jax_enable_x64=False']
    """
    return [f"{name}={value}" for name, value in _compat.program_settings().items()]


def compiler_flags() -> list[str]:
    """Return the compiler flags in the environment that may change results, a line for each.

    The last of several values of a flag counts; a flag without a value is true.

    Example:
      >>> import os
      >>> from txcore.launch import settings
      >>> before = os.environ.get("XLA_FLAGS")
      >>> os.environ["XLA_FLAGS"] = "--xla_dump_to=/tmp/a --xla_cpu_enable_fast_math"
      >>> settings.compiler_flags()
      ['XLA_FLAGS --xla_cpu_enable_fast_math=true']
      >>> _ = os.environ.pop("XLA_FLAGS") if before is None else os.environ.update(XLA_FLAGS=before)
    """
    rows = []
    for variable in FLAGS:
        flags = _read_flags(os.environ.get(variable, ""))
        rows += [f"{variable} --{name}={flags[name]}" for name in sorted(flags)]
    return rows + [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]


def _read_flags(text: str) -> dict[str, str]:
    """Return the flags of a variable by name, without the harmless ones."""
    flags = {}
    for word in _text_of(text).split():
        name, given, value = word.lstrip("-").partition("=")
        if name not in HARMLESS_FLAGS and not name.startswith(HARMLESS_PREFIXES):
            flags[name] = value if given else "true"
    return flags


def _text_of(text: str) -> str:
    """Return the flags in a text, or in the file that a text without a leading dash names."""
    text = text.strip()
    if not text or text.startswith("-"):
        return text
    try:
        with Path(text).open("rb") as file:
            return file.read(MOST_BYTES).decode(errors="replace")
    except OSError:
        return text
