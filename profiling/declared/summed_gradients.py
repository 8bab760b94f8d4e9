"""Find the gradients that autodiff has summed over devices already, where they leave a program.

The transpose of a cast to varying is a psum. Where it ends is what tells right from wrong:
after the statistics of batch normalisation it goes on to the transpose of their own reduction,
which casts it to varying again, and is a part of each device's local gradient, as it must be. A
cotangent that is not cast again is the gradient of something stored: a sum over the devices of
what the step takes for one device's, or for their mean.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from txcore import _compat, tags
from txcore.profiling.declared import source
from txcore.profiling.declared.collectives import axes_of, made_by_autodiff
from txcore.profiling.declared.forward import CASTS, Calls, Forward, path_in


@dataclass(frozen=True)
class Sum:
    """A psum along `axis` that autodiff made: its tag, elements and "file.py:12"."""

    axis: str
    tag: str | None
    elements: int
    source: str


_Sums = frozenset[Sum]


def summed_gradients(jaxpr: Any, axes: Iterable[str]) -> list[Sum]:
    """Find the psums along `axes` of a backward pass that reach an output as sums.

    Those that autodiff makes by itself, and those of `tx.vary`. A reduction of a batch's
    statistics inside of a loss has such psums too, and none of them is found.

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
      >>> found = summed_gradients(jax.make_jaxpr(f)(1.0, jax.numpy.ones(2)), ["data"])
      >>> [(s.axis, s.elements) for s in found]
      [('data', 1)]
    """
    wanted = frozenset(axes)

    def rule(eqn: Any, inputs: Sequence[_Sums], calls: Calls) -> _Sums:
        sums = frozenset[Sum]().union(*inputs)
        name = eqn.primitive.name
        if name != "psum_invariant" and not (sums and name in CASTS):
            return sums
        path = path_in(calls, eqn)
        if not made_by_autodiff(path):
            return sums
        along = axes_of(eqn.params)
        if name in CASTS:
            return frozenset(s for s in sums if s.axis not in along)
        tag = tags.tag_in(path)
        # A custom_vjp's backward pass may call tx.psum by its name.
        if tag is not None and tag.partition("/")[0] != "vary":
            return sums
        return sums | {_sum(eqn, tag, axis) for axis in along if axis in wanted}

    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    walk: Forward[_Sums] = Forward(rule, frozenset.union, frozenset())
    outputs = walk.run(jaxpr, [frozenset()] * len(jaxpr.invars))
    return sorted(frozenset[Sum]().union(*outputs), key=lambda s: (s.source, s.elements, s.axis))


def _sum(eqn: Any, tag: str | None, axis: str) -> Sum:
    elements = sum(int(np.prod(v.aval.shape)) for v in eqn.invars)
    place = source.shorten(_compat.eqn_frames(eqn))
    return Sum(axis, tag, elements, place)
