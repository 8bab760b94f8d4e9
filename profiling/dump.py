"""Compile a program and keep the module as it was right after SPMD partitioning."""

import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from txcore import _compat

C = TypeVar("C")


def compile_with_partitioned(
    lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None
) -> tuple[jax.stages.Compiled, str]:
    """Compile once, and return the program with its module right after SPMD partitioning.

    That module shows every collective as the user or the partitioner asked for it, before the
    compiler merges, moves or rewrites any.

    Args:
      lowered: `jax.jit(f).lower(*args)`.
      options: XLA's compiler options, as for `lowered.compile`.

    Returns:
      The compiled program, and the text of the partitioned module; "" where the compiler
      partitioned nothing, as for a single device. Nothing stays on disk.

    Example:
      >>> compiled, text = compile_with_partitioned(jax.jit(jnp.sin).lower(jnp.ones(3)))
      >>> compiled(jnp.zeros(3)).tolist(), text
      ([0.0, 0.0, 0.0], '')
    """

    def compile_with(options: dict[str, Any]) -> jax.stages.Compiled:
        return lowered.compile(compiler_options=options)

    with _compat.no_persistent_cache():  # nothing is dumped on a hit
        return compile_and_dump(compile_with, options)


def compile_and_dump(
    compile_: Callable[[dict[str, Any]], C], options: Mapping[str, Any] | None = None
) -> tuple[C, str]:
    """Call a compiler with options that dump; return its result and the partitioned module."""
    with tempfile.TemporaryDirectory(prefix="txcore-") as folder:
        dump = {
            "xla_dump_to": folder,
            "xla_dump_hlo_pass_re": "spmd-partitioning",  # tpu-spmd-partitioning on TPU
            "xla_dump_hlo_as_text": True,
        }
        compiled = compile_({**(options or {}), **dump})
        # Module 0 ... pass 0, 1: the last is the outer module's last partitioning.
        found = sorted(pathlib.Path(folder).glob("*.after_*spmd-partitioning.before_*.txt"))
        return compiled, found[-1].read_text() if found else ""
