"""Find the hangs and false types under a cond or while whose predicate differs between devices.

A collective waits for all devices of its group. Where the predicate of a cond or while differs
along an axis, some devices take another branch or leave the loop earlier, and never join it.
"""

from dataclasses import dataclass

from txcore import _compat
from txcore.profiling.declared import source
from txcore.profiling.declared.axis_dataflow import Seen, search_equations
from txcore.profiling.declared.equations import (
    BRANCHING,
    KIND_OF,
    Eqn,
    Jaxpr,
    Var,
    is_literal,
    open_jaxpr,
)
from txcore.profiling.declared.relation import may_differ
from txcore.profiling.declared.remote_dma import REMOTE_DMA, sent_by_kernel


@dataclass(frozen=True)
class Divergence:
    """Something wrong about a cond or while whose predicate differs along a mesh axis.

    Attributes:
      problem: "hangs": a collective inside, which not all its devices reach; "lies": an output
        that jax types as the same along the axis, though it differs (jax issue 40823).
      axis: the axis along which the predicate differs.
      name: the tag of the collective, or else its jax primitive; of a lie "cond" or "while".
      kind: the HLO op of the collective ("all-reduce"); of a lie as `name`.
      axes: the axes over which the collective communicates; none of a lie.
      source: "file.py:12" of the collective; of a lie that of the cond or while.
      control: "cond" (a switch too) or "while".
      control_source: "file.py:12" of it.
    """

    problem: str
    axis: str
    name: str
    kind: str
    axes: tuple[str, ...]
    source: str
    control: str
    control_source: str

    def __str__(self) -> str:
        where = f"{self.control} at {self.control_source or '?'}"
        if self.problem == "lies":
            return (
                f"an output of the {where} is typed as the same along axis {self.axis!r}, along "
                "which its predicate differs"
            )
        return (
            f"{self.name} over {'+'.join(self.axes)} at {self.source or '?'} inside the {where}, "
            f"whose predicate differs along axis {self.axis!r}"
        )


def find_divergences(jaxpr: Jaxpr) -> tuple[Divergence, ...]:
    """Find the collectives that not all their devices reach, and the outputs with false types.

    Where a predicate differs along an axis, reductions, gathers and exchanges along that axis
    hang, and so do permutes along any axis: XLA's collective-permute has no groups, so all devices
    of the program have to join it. Collectives along other axes are right: all devices of their
    groups agree on the predicate. Dead code is left out.

    Args:
      jaxpr: a Jaxpr or ClosedJaxpr with shard_maps in it, as `jax.jit(f).trace(*args).jaxpr`.

    Returns:
      One for each equation and axis.

    Example:
      >>> import jax
      >>> mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> spec = jax.sharding.PartitionSpec("data")
      >>> total = lambda x: jax.lax.psum(x, "data")
      >>> f = jax.shard_map(lambda x: jax.lax.cond(x[0] > 0, total, lambda x: x, x), mesh=mesh,
      ...                   in_specs=spec, out_specs=spec, check_vma=False)
      >>> found = find_divergences(jax.make_jaxpr(f)(jax.numpy.ones(2)))
      >>> [(d.problem, d.name, d.axis) for d in found]
      [('hangs', 'psum', 'data')]
    """
    live = _compat.live_jaxpr(open_jaxpr(jaxpr))
    return tuple(search_equations(live, _find_in_equation, only_with=BRANCHING))


def _find_in_equation(seen: Seen) -> Divergence | None:
    if seen.splits:
        return _find_false_type(seen)
    axes = tuple(a for a in seen.axes if a in seen.sizes)
    kind = KIND_OF.get(seen.name)
    if sent := sent_by_kernel(seen.eqn, tuple(seen.sizes.items())):
        kind, axes = REMOTE_DMA, sent.axes
    # A psend waits for its precv alone, which may stand in another branch.
    if kind is None or seen.name == "psend" or seen.frame.under is None or not axes:
        return None
    if kind == "collective-permute" or seen.axis in axes:
        name = seen.tag or seen.name
        return _make_divergence("hangs", seen, name, kind, axes, seen.frame.under)
    return None


def _find_false_type(seen: Seen) -> Divergence | None:
    if not seen.frame.tracked:
        return None
    axis = seen.axis
    wrong = {
        var
        for var, value in zip(seen.eqn.outvars, seen.outputs, strict=True)
        if may_differ(value) and axis not in _compat.varying_axes_of(var.aval)
    }
    # A loop's own counter has such a type, and mostly nothing after the loop looks at it.
    if not any(v in wrong for v in _list_uses(seen.jaxpr)):
        return None
    return _make_divergence("lies", seen, seen.name, seen.name, (), seen.eqn)


def _list_uses(jaxpr: Jaxpr) -> list[Var]:
    used = [v for eqn in jaxpr.eqns for v in eqn.invars]
    return [v for v in [*used, *jaxpr.outvars] if not is_literal(v)]


def _make_divergence(
    problem: str, seen: Seen, name: str, kind: str, axes: tuple[str, ...], control: Eqn
) -> Divergence:
    return Divergence(
        problem=problem,
        axis=seen.axis,
        name=name,
        kind=kind,
        axes=axes,
        source=source.user_source_line(_compat.eqn_frames(seen.eqn)),
        control=control.primitive.name,
        control_source=source.user_source_line(_compat.eqn_frames(control)),
    )
