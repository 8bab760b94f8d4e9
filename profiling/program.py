"""A function and its arguments, traced, lowered and compiled, here or for another machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from txcore import _compat
from txcore.profiling.compiled_with import CompiledWith, read_compiled_with
from txcore.profiling.declared.equations import Jaxpr, is_one_shard_map
from txcore.profiling.dump import compile_with_partitioned
from txcore.profiling.targets import Target, parse_target


@dataclass(frozen=True)
class Program:
    """One function on its way to a machine.

    Attributes:
      jaxpr: the traced program.
      lowered: the compiler's input.
      compiled: the compiler's result.
      partitioned: the module right after SPMD partitioning; "" where it was not kept, or nothing
        was partitioned.
      target: the machine that it was compiled for: "cpu:8", "tpu:v5p:16x16x16".
      options: the compiler options that it was compiled with.
      compiled_with: those, and jax's settings then.
    """

    jaxpr: Jaxpr
    lowered: jax.stages.Lowered
    compiled: jax.stages.Compiled
    partitioned: str
    target: str
    options: Mapping[str, Any]
    compiled_with: CompiledWith

    def read_partitioned(self) -> str:
        """Return the module right after SPMD partitioning; compile again where it was not kept."""
        return self.partitioned or compile_with_partitioned(self.lowered, self.options)[1]


def compile_program(
    fn: Callable[..., Any], args: Sequence[Any], *, keep_partitioned: bool = False
) -> Program:
    """Trace and compile a function for the devices of its arguments.

    Args:
      fn: any jax function, jitted or not.
      args: its arguments; arrays or `jax.ShapeDtypeStruct`s.
      keep_partitioned: whether to keep the module right after SPMD partitioning in any case; else
        it is kept only where the partitioner had anything to decide.

    Returns:
      The program. Nothing is executed.

    Example:
      >>> compile_program(jnp.sin, (jnp.ones(3),)).target
      'cpu:1'
    """
    return _trace_and_compile(fn, args, {}, "", keep_partitioned)


def compile_for_target(
    build: Callable[..., Any],
    target: str,
    mesh: Mapping[str, int] | None,
    *,
    keep_partitioned: bool = False,
) -> Program:
    """Trace and compile the function that `build` returns for a machine that may be absent.

    Args:
      build: `build(mesh) -> (fn, args)` with the target's mesh, args with shardings on it; or
        `build() -> (fn, args)`, which makes its own (`parse_target(...).mesh(...)`).
      target: see `parse_target`.
      mesh: size of each axis; None for a `build` that takes no mesh.
      keep_partitioned: whether to keep the module right after SPMD partitioning in any case; of a
        TPU's program it is kept anyway (`Target.rewrites_collectives`).

    Returns:
      The program.

    Raises:
      TypeError: `build` is no such function.
      ValueError: no such target, a mesh that does not fit it, or a function that was not
        compiled for its devices.
      ImportError, RuntimeError: the target's compiler is missing or does not work.
    """
    found = parse_target(target)
    if not callable(build):
        raise TypeError(
            "with target= audit needs a function build(mesh) that returns (fn, args), got a "
            f"{type(build).__name__}: a compiled program was compiled for its machine already"
        )
    built = build() if mesh is None else build(found.mesh(mesh))
    if not (isinstance(built, tuple) and len(built) == 2 and callable(built[0])):
        raise TypeError(
            "with target= audit needs a function build(mesh) that returns (fn, args), but it "
            f"returned a {type(built).__name__}"
        )
    fn, args = built
    shapes, options = _replace_absent_arrays(args, found), found.compiler_options
    keep_partitioned = keep_partitioned or found.rewrites_collectives
    with _compat.no_persistent_cache():  # which would not read back what it wrote
        program = _trace_and_compile(fn, shapes, options, target, keep_partitioned)
    if devices_of(program.compiled) != set(found.devices):
        raise ValueError(
            f"the target {target!r} needs a function that is compiled for its devices, got one for "
            f"{machine_of(program.compiled)}: "
            "give its arguments shardings on the mesh that build(mesh) got, as "
            "jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(...)))"
        )
    return program


def _trace_and_compile(
    fn: Callable[..., Any],
    args: Sequence[Any],
    options: Mapping[str, Any],
    target: str,
    keep_partitioned: bool,
) -> Program:
    is_jitted = hasattr(fn, "trace") and hasattr(fn, "lower")
    jitted: Any = fn if is_jitted else jax.jit(fn)
    return compile_traced(jitted.trace(*args), options, target, keep_partitioned=keep_partitioned)


def compile_traced(
    traced: Any, options: Mapping[str, Any], target: str = "", *, keep_partitioned: bool = False
) -> Program:
    """Compile a traced function.

    Args:
      traced: `jax.jit(f).trace(*args)`.
      options: XLA's compiler options.
      target: the machine's name, "cpu:8"; by default it is made from the devices.
      keep_partitioned: as for `compile_program`.

    Returns:
      The program.
    """
    jaxpr, lowered = _compat.plain_jaxpr(traced.jaxpr), traced.lower()
    return compile_lowered(jaxpr, lowered, options, target, keep_partitioned=keep_partitioned)


def compile_lowered(
    jaxpr: Jaxpr,
    lowered: jax.stages.Lowered,
    options: Mapping[str, Any],
    target: str = "",
    *,
    keep_partitioned: bool = False,
) -> Program:
    """Compile a program that is lowered already; else as `compile_traced`."""
    if keep_partitioned or not is_one_shard_map(jaxpr):
        compiled, partitioned = compile_with_partitioned(lowered, options)
    else:
        compiled, partitioned = lowered.compile(compiler_options=dict(options)), ""
    machine = target or machine_of(compiled)
    used = read_compiled_with(options)
    return Program(jaxpr, lowered, compiled, partitioned, machine, options, used)


def _replace_absent_arrays(args: Sequence[Any], target: Target) -> Any:
    """Replace arrays on other devices than the target's by their shapes."""
    there = set(target.devices)

    def shape_if_absent(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.sharding.device_set <= there:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return leaf

    return jax.tree.map(shape_if_absent, args)


def devices_of(compiled: jax.stages.Compiled) -> set[jax.Device]:
    """Return the devices of a compiled program's arguments and results."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    return {device for sharding in shardings for device in sharding.device_set}


def machine_of(compiled: jax.stages.Compiled) -> str:
    """Name a program's machine by its devices: "cpu:8"; "" where it has none."""
    devices = devices_of(compiled)
    return f"{next(iter(devices)).platform}:{len(devices)}" if devices else ""
