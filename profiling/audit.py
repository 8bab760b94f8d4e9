"""Account for every collective of a compiled program: `audit`, `audit_text` and their helpers."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from txcore import _compat
from txcore.errors import TxcoreError
from txcore.profiling import meshes
from txcore.profiling.declared.collectives import Declared, list_declared
from txcore.profiling.declared.divergence import find_divergences
from txcore.profiling.declared.equations import Jaxpr, is_one_shard_map, meshes_of
from txcore.profiling.declared.kernels import kernels_in_text, kernels_used
from txcore.profiling.hlo import Module, Op, collectives_of, find_collectives, read_modules
from txcore.profiling.matching.arrays import units_of
from txcore.profiling.matching.match import Matched, match_collectives
from txcore.profiling.matching.reconcile import reconcile_modules
from txcore.profiling.matching.rows import rows_of
from txcore.profiling.program import Program, compile_for_target, compile_program, machine_of
from txcore.profiling.report import Report
from txcore.profiling.report.report import check_allowed

MOST_BYTES = 1 << 28  # of a text from elsewhere


class AutoShardingError(TxcoreError, AssertionError):
    """A program has collectives that nobody asked for, or lacks declared ones; holds `report`."""

    def __init__(self, report: Report):
        super().__init__(
            f"the compiled program does not have exactly the declared collectives:\n{report}\n"
            "write the communication out (jax.shard_map with txcore's collectives), or give the "
            "arguments and results the shardings that the program wants"
        )
        self.report = report


def audit(
    fn: Callable[..., Any] | jax.stages.Compiled,
    *args: Any,
    target: str | None = None,
    mesh: Mapping[str, int] | None = None,
    after_spmd: bool = False,
) -> Report:
    """Compile a function and account for every collective in the result.

    Args:
      fn: any jax function, jitted or not, or an already compiled one (`jax.stages.Compiled`),
        whose traced program is gone (`report.checked` is False). With `target` a function
        `build(mesh) -> (fn, args)`.
      *args: its arguments; arrays or `jax.ShapeDtypeStruct`s, with shardings where they have one.
        None with a compiled function or a target.
      target: a machine to compile for, which may be absent: "tpu:v5p:16x16x16",
        "cuda:h100:64x8" (hosts x GPUs), "cpu:8"; see `txcore.profiling.targets`.
      mesh: the target's axes and their sizes, `{"data": 512, "model": 8}`; needed with `target`,
        unless `build` takes no argument and makes its own mesh.
      after_spmd: account for the module right after SPMD partitioning, where each collective
        still stands alone, instead of the optimized one.

    Returns:
      The report. Nothing is executed.

    Raises:
      TypeError: `fn` is not callable, or options do not go together.
      ValueError: no such target, or a mesh that does not fit it.
      ImportError, RuntimeError: the target's compiler is missing or does not work.

    Example:
      >>> import jax.numpy as jnp
      >>> print(audit(jnp.sin, jnp.ones(3)))
      proved: no collective in the program
      >>> def build(mesh):
      ...     rows = jax.sharding.NamedSharding(mesh, P("data"))
      ...     return jnp.cumsum, (jax.ShapeDtypeStruct((8,), jnp.float32, sharding=rows),)
      >>> report = audit(build, target="cpu:4", mesh={"data": 4})
      >>> report.ok, report.target, report.mesh
      (False, 'cpu:4', (('data', 4),))
    """
    if isinstance(fn, jax.stages.Compiled):
        _check_compiled_alone(args, target, mesh, after_spmd)
        return audit_compiled(fn)
    if not callable(fn):
        raise TypeError(
            f"audit needs a jax function or a jax.stages.Compiled, but got a {type(fn).__name__}: "
            "call audit(fn, *args), or audit_text(hlo) for text"
        )
    if target is None:
        if mesh is not None:
            raise TypeError(
                "audit needs target= with mesh=: call audit(build, target=..., mesh=...), or give "
                "the arguments of audit(fn, *args) shardings on a mesh"
            )
        program = compile_program(fn, args, keep_partitioned=after_spmd)
        return audit_program(program, after_spmd=after_spmd)
    _check_build(fn, args, mesh)
    program = compile_for_target(fn, target, mesh, keep_partitioned=after_spmd)
    return audit_program(program, after_spmd=after_spmd)


def audit_program(program: Program, *, after_spmd: bool = False) -> Report:
    """Account for every collective of a program.

    Args:
      program: from `compile_program` or `compile_for_target`.
      after_spmd: as for `audit`; the program must have kept its partitioned module.

    Returns:
      The report.
    """
    if not (after_spmd and program.partitioned):
        report = audit_compiled(program.compiled, program.jaxpr, partition=program.read_partitioned)
        return replace(
            report,
            target=program.target,
            compiled_with=program.compiled_with,
            program=program,
        )
    sizes = _find_mesh_sizes(program.compiled, program.jaxpr, None)
    ops, declared = _read_collectives(program.partitioned, sizes), list_declared(program.jaxpr)
    matched = _match_declared(ops, declared)
    report = _make_report(ops, matched, declared, sizes)
    return replace(
        report,
        target=program.target,
        compiled_with=program.compiled_with,
        program=program,
        divergent=find_divergences(program.jaxpr),
        kernels=kernels_used(program.jaxpr),
    )


def _check_compiled_alone(args: Any, target: Any, mesh: Any, after_spmd: bool) -> None:
    if args:
        raise TypeError(
            "audit needs a compiled function alone, since it was compiled for its arguments, "
            f"but got {len(args)} more: call audit(compiled)"
        )
    if target is not None or mesh is not None or after_spmd:
        raise TypeError(
            "audit needs a compiled function alone, since it was compiled for its machine, but "
            "got target=, mesh= or after_spmd= too: give it the function itself"
        )


def _check_build(build: Callable[..., Any], args: Any, mesh: Any) -> None:
    if args:
        raise TypeError(
            "with target= audit needs build(mesh), which returns (fn, args), alone, but got "
            f"{len(args)} arguments more: return them from build"
        )
    given = () if mesh is None else (mesh,)
    try:
        inspect.signature(build).bind(*given)
    except TypeError:
        wanted = (
            'give the sizes of its axes, mesh={"data": 8}'
            if mesh is None
            else "leave mesh= out, or let build take it"
        )
        call = "build()" if mesh is None else "build(mesh)"
        raise TypeError(
            f"with target= audit calls {call}, but this one does not take "
            f"{len(given)} arguments: {wanted}"
        ) from None


def audit_compiled(
    compiled: jax.stages.Compiled,
    jaxpr: Jaxpr | None = None,
    mesh: meshes.MeshLike | None = None,
    *,
    partition: Callable[[], str] | None = None,
) -> Report:
    """Account for every collective of a compiled program.

    Args:
      compiled: the program.
      jaxpr: the traced program, `jax.jit(f).trace(*args).jaxpr`; without it there is nothing to
        compare with.
      mesh: the mesh whose axes the rows name; by default the meshes of the program's shard_maps,
        or of its arguments' and results' shardings.
      partition: returns the text of the module right after SPMD partitioning. It is called where
        the optimized module alone leaves a doubt; without it the doubt counts against the program.

    Returns:
      The report.
    """
    sizes = _find_mesh_sizes(compiled, jaxpr, mesh)
    text = compiled.as_text() or ""
    ops = _read_collectives(text, sizes)
    if jaxpr is None:
        report = _make_report(ops, _match_nothing(ops), None, sizes)
        return replace(report, target=machine_of(compiled), kernels=kernels_in_text(text))
    declared = list_declared(jaxpr)
    matched = _match_declared(ops, declared)
    report = _make_report(ops, matched, declared, sizes)
    # Where the partitioner had nothing to decide, the optimized module alone is enough.
    has_doubt = not (report.ok and is_one_shard_map(jaxpr))
    if partition and has_doubt and (early := _read_collectives(partition(), sizes)):
        better = reconcile_modules(matched, ops, _match_declared(early, declared), early, declared)
        report = _make_report(ops, better, declared, sizes)
    return replace(
        report,
        target=machine_of(compiled),
        divergent=find_divergences(jaxpr),
        kernels=kernels_used(jaxpr),
    )


def audit_text(
    hlo: str, *, mesh: meshes.MeshLike | None = None, max_bytes: int | None = None
) -> Report:
    """List every collective in the text of compiled HLO, by the words of its own lines.

    Args:
      hlo: optimized HLO of any platform, one or more modules; it may be indented or have the
        prefixes of a log before each line.
      mesh: the mesh whose axes the rows name (a Mesh or AbstractMesh); without it they have none.
      max_bytes: the longest text to read, 256 MiB by default; time and memory grow with it.

    Returns:
      The report; its `checked` is False, since text cannot be compared with a traced program.

    Raises:
      TypeError: `hlo` is not text.
      ValueError: there is no HLO module in it, it is too long, or was compiled for another number
        of devices than the mesh has.

    Example:
      >>> report = audit_text("HloModule m, num_partitions=2\\nENTRY %e (x: f32[8]) -> f32[8] {\\n"
      ...     "  %x = f32[8]{0} parameter(0)\\n"
      ...     "  ROOT %s = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1}},"
      ...     " to_apply=%add, metadata={op_name=\\"jit(f)/shard_map/psum\\"}\\n}\\n")
      >>> [(c.kind, c.origin, c.payload_bytes) for c in report.collectives]
      [('all-reduce', 'user', 32)]
    """
    if not isinstance(hlo, str):
        raise TypeError(
            f"audit_text needs HLO text, but got a {type(hlo).__name__}: pass compiled.as_text() "
            "or an XLA dump"
        )
    most = MOST_BYTES if max_bytes is None else max_bytes
    if len(hlo) > most:
        raise ValueError(
            f"audit_text needs at most {most} bytes of HLO, but got {len(hlo)}: give a larger "
            "max_bytes"
        )
    sizes = (meshes.sizes_of(mesh),) if mesh is not None else ()
    modules = read_modules(hlo)
    _check_devices(modules, _count_devices(sizes))
    ops = collectives_of(modules, devices=_count_devices(sizes))
    if "HloModule" not in hlo and all(op.kind == "unknown" for op in ops):
        raise ValueError(
            "audit_text needs the text of an HLO module, which begins with 'HloModule', but got "
            f"{hlo[:40]!r}: pass compiled.as_text() or an XLA dump"
        )
    report = _make_report(ops, _match_nothing(ops), None, sizes)
    return replace(report, kernels=kernels_in_text(hlo))


def _check_devices(modules: Sequence[Module], given: int | None) -> None:
    """Check that a mesh has the number of devices in the text's headers."""
    counts = {module.devices for module in modules if module.devices is not None}
    if given is not None and counts and given not in counts:
        said = " or ".join(map(str, sorted(counts)))
        raise ValueError(
            f"audit_text needs a mesh of {said} devices, as the module was compiled "
            f"for, but got one of {given}: give the axes that it was compiled with"
        )


def assert_no_auto_sharding(
    fn: Callable[..., Any] | jax.stages.Compiled,
    *args: Any,
    target: str | None = None,
    mesh: Mapping[str, int] | None = None,
    allow: Iterable[str] = (),
) -> Report:
    """Audit a function and raise unless every collective in it was asked for.

    Args:
      fn: as for `audit`.
      *args: as for `audit`.
      target: as for `audit`.
      mesh: as for `audit`.
      allow: origins of what nobody asked for to let through, as {"partitioner"} in a program that
        leaves its sharding to the compiler: see `Report.allowing`. `txcore lock update --allow`
        also refuses more of it.

    Returns:
      The report, which is ok.

    Raises:
      AutoShardingError: something is unexplained or missing; its text has the table.
      TypeError, ValueError, ImportError, RuntimeError: as `audit`.
    """
    allowed = check_allowed(allow)
    report = audit(fn, *args, target=target, mesh=mesh).allowing(allowed)
    if not report.ok:
        raise AutoShardingError(report)
    return report


def _find_mesh_sizes(
    compiled: jax.stages.Compiled, jaxpr: Jaxpr | None, mesh: meshes.MeshLike | None
) -> tuple[meshes.Sizes, ...]:
    if mesh is not None:
        return (meshes.sizes_of(mesh),)
    if jaxpr is not None and (found := meshes_of(jaxpr)):
        return found
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    named = (s for s in shardings if isinstance(s, jax.sharding.NamedSharding))
    return tuple(dict.fromkeys(meshes.sizes_of(s.mesh) for s in named))


def _count_devices(sizes: Sequence[meshes.Sizes]) -> int | None:
    """Count the devices of the largest mesh; None where there is no mesh."""
    return max((meshes.count_devices(s, tuple(name for name, _ in s)) for s in sizes), default=None)


def _read_collectives(text: str, sizes: Sequence[meshes.Sizes]) -> tuple[Op, ...]:
    return find_collectives(text, devices=_count_devices(sizes))


def _match_declared(ops: Sequence[Op], declared: Sequence[Declared]) -> Matched:
    return match_collectives(ops, declared, marks=_compat.marks_partitioner())


def _match_nothing(ops: Sequence[Op]) -> Matched:
    """Return the arrays of ops, all without a match."""
    units = tuple(units_of(ops))
    return Matched(units, ((),) * len(units), ())


def _make_report(
    ops: Sequence[Op],
    matched: Matched,
    declared: Sequence[Declared] | None,
    sizes: Sequence[meshes.Sizes],
) -> Report:
    rows, fates = rows_of(ops, matched, declared, sizes)
    return Report(
        rows,
        missing=tuple(f.declared for f in fates if "missing" in f.fates),
        checked=declared is not None,
        fates=fates,
        mesh=sizes[0] if sizes else (),
    )
