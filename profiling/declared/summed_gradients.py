"""Find the gradients that leave a program after autodiff has summed them over devices.

The transpose of a cast to varying is a psum, right or wrong by where its result goes. After the
statistics of batch normalisation it goes on to the transpose of their own reduction, which casts
it to varying again: it is a part of each device's local gradient, as it must be. A cotangent that
is not cast again is the gradient of something stored: the step takes that sum for one device's
gradient, or for the devices' mean.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from txcore import _compat, tags
from txcore.profiling.declared import source
from txcore.profiling.declared.equations import (
    CASTS,
    Eqn,
    Jaxpr,
    Var,
    axes_of,
    made_by_autodiff,
    open_jaxpr,
    path_of,
)
from txcore.profiling.declared.forward import Forward, Frame


@dataclass(frozen=True)
class Sum:
    """A psum that autodiff made.

    Attributes:
      axis: the mesh axis that it sums over.
      tag: the tag of the cast whose transpose it is, or None.
      elements: those of its operands.
      source: "file.py:12".
    """

    axis: str
    tag: str | None
    elements: int
    source: str


_Sums = frozenset[Sum]


def find_summed_gradients(jaxpr: Jaxpr, axes: Iterable[str]) -> list[Sum]:
    """Find the psums along `axes` of a backward pass that reach an output as sums.

    These are the psums that autodiff makes by itself, and those of `tx.vary`. A reduction of a
    batch's statistics inside of a loss has such psums too; they are left out.

    Args:
      jaxpr: a Jaxpr or ClosedJaxpr of a program whose shard_maps track what varies.
      axes: the axes along which gradients have to be local.

    Returns:
      Each once, by source line.

    Example:
      >>> import jax
      >>> mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> spec = jax.sharding.PartitionSpec
      >>> f = jax.shard_map(jax.grad(lambda w, x: (w * x).sum()), mesh=mesh,
      ...                   in_specs=(spec(), spec("data")), out_specs=spec())
      >>> found = find_summed_gradients(jax.make_jaxpr(f)(1.0, jax.numpy.ones(2)), ["data"])
      >>> [(s.axis, s.elements) for s in found]
      [('data', 1)]
    """
    jaxpr = open_jaxpr(jaxpr)
    nothing = frozenset[Sum]()
    outputs = _SummedGradients(frozenset(axes)).run_jaxpr(
        jaxpr, [nothing] * len(jaxpr.invars), Frame()
    )
    return sorted(nothing.union(*outputs), key=lambda s: (s.source, s.elements, s.axis))


class _SummedGradients(Forward[_Sums]):
    """The autodiff sums in each value that nothing has cast to varying again."""

    def __init__(self, wanted: frozenset[str]) -> None:
        self._wanted = wanted

    def of_literal(self, var: Var) -> _Sums:
        return frozenset()

    def of_constant(self) -> _Sums:
        return frozenset()

    def join_facts(self, a: _Sums, b: _Sums) -> _Sums:
        return a | b

    def apply_equation(
        self, eqn: Eqn, jaxpr: Jaxpr, inputs: list[_Sums], frame: Frame
    ) -> list[_Sums]:
        return [self._sums_after(eqn, frozenset[Sum]().union(*inputs), frame)] * len(eqn.outvars)

    def _sums_after(self, eqn: Eqn, sums: _Sums, frame: Frame) -> _Sums:
        name = eqn.primitive.name
        if name != "psum_invariant" and not (sums and name in CASTS):
            return sums
        path = path_of(eqn, frame.path)
        if not made_by_autodiff(path):
            return sums
        along = axes_of(eqn.params)
        if name in CASTS:
            return frozenset(s for s in sums if s.axis not in along)
        tag = tags.tag_in(path)
        # A custom_vjp's backward pass may call tx.psum by its name.
        if tag is not None and tag.partition("/")[0] != "vary":
            return sums
        return sums | {_describe_sum(eqn, tag, axis) for axis in along if axis in self._wanted}


def _describe_sum(eqn: Eqn, tag: str | None, axis: str) -> Sum:
    elements = sum(int(np.prod(v.aval.shape)) for v in eqn.invars)
    place = source.user_source_line(_compat.eqn_frames(eqn))
    return Sum(axis, tag, elements, place)
