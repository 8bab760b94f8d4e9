"""Find random numbers that each example should have for itself, but every device draws alike.

A key that is the same on every device gives every device the same numbers. That is right for noise
on the parameters, which are the same everywhere, and wrong for a mask over local examples: the
second device's examples lose what the first device's lose. Types do not tell: numbers drawn from
such a key are invariant, and cast to varying where they meet the batch.

So the walk tracks whose rows the first dim of each value holds. It reports a draw with a number for
each row that meets, row by row, a value with a row for each local example. It leaves out draws that
lost their rows before (by a sum, a contraction, a broadcast) or met parameters first: nothing is a
false alarm, though draws that reach the examples in other ways are missed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from txcore import _compat
from txcore.profiling.declared import source
from txcore.profiling.declared.equations import (
    CASTS,
    EQUALIZERS,
    GATHERS,
    Eqn,
    Jaxpr,
    Var,
    axes_of,
    axes_of_spec,
    has_any,
    name_of,
    open_jaxpr,
)
from txcore.profiling.declared.forward import Forward, Frame, find_shard_maps

_DRAWS = ("random_bits", "random_gamma")
_PICKS = ("dynamic_slice", "gather")
_OTHER_LENGTH = ("slice", "dynamic_slice", "concatenate", "pad", "rev", "dynamic_update_slice")


@dataclass(frozen=True)
class Draw:
    """Random numbers that are the same on all devices along `axis`.

    Attributes:
      axis: a data axis.
      shape: that of the numbers.
      source: "file.py:12" of the draw, in the user's code.
      inside: the same in the package that the user's code calls, or "".
    """

    axis: str
    shape: tuple[int, ...]
    source: str
    inside: str


class _Rows(IntEnum):
    """The owner of a value's rows; the larger wins where values meet."""

    NOTHING = 0  # constants, scalars, what is broadcast along the first dim
    DRAWN = 1  # random numbers, for each row its own, the same on every device
    SHARED = 2  # those of a parameter or another input that is the same on every device
    EXAMPLES = 3  # one or more for each local example


@dataclass(frozen=True)
class _Fact:
    differs: bool = False
    rows: _Rows = _Rows.NOTHING
    draws: frozenset[Draw] = frozenset()


def find_shared_draws(jaxpr: Jaxpr, axes: Sequence[str]) -> list[Draw]:
    """Find the draws from keys that are the same along `axes`, for local examples.

    Args:
      jaxpr: a Jaxpr or ClosedJaxpr with shard_maps in it.
      axes: the data axes, over which the first dim of a batch is sharded.

    Returns:
      Each draw once for each axis.

    Example:
      >>> import jax
      >>> mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> spec = jax.sharding.PartitionSpec
      >>> def drop(key, x):
      ...     return jax.numpy.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)
      >>> f = jax.shard_map(drop, mesh=mesh, in_specs=(spec(), spec("data")),
      ...                   out_specs=spec("data"))
      >>> jaxpr = jax.make_jaxpr(f)(jax.random.key(0), jax.numpy.ones(8))
      >>> [(draw.axis, draw.shape) for draw in find_shared_draws(jaxpr, ["data"])]
      [('data', (4,))]
    """
    jaxpr = open_jaxpr(jaxpr)
    if not axes or not has_any(jaxpr, _DRAWS):
        return []
    found: dict[Draw, None] = {}
    for eqn, frame in find_shard_maps(jaxpr):
        body = open_jaxpr(eqn.params["jaxpr"])
        for axis in axes:
            inputs = [
                _fact_of_spec(spec, axis, var.aval.shape)
                for spec, var in zip(eqn.params["in_specs"], body.invars, strict=True)
            ]
            _SharedDraws(axis, found).run_jaxpr(body, inputs, frame)
    return list(found)


def _fact_of_spec(spec: Any, axis: str, shape: tuple[int, ...]) -> _Fact:
    if axis in axes_of_spec(spec[:1]):
        return _Fact(True, _Rows.EXAMPLES)
    return _Fact(axis in axes_of_spec(spec), _Rows.SHARED if shape else _Rows.NOTHING)


class _SharedDraws(Forward[_Fact]):
    """The owner of each value's rows along one axis; draws that meet examples go into `found`."""

    def __init__(self, axis: str, found: dict[Draw, None]) -> None:
        self._axis, self._found = axis, found

    def of_literal(self, var: Var) -> _Fact:
        return _Fact()

    def of_constant(self) -> _Fact:
        return _Fact()

    def join_facts(self, a: _Fact, b: _Fact) -> _Fact:
        rows = max(a.rows, b.rows)
        draws = a.draws | b.draws if rows is _Rows.DRAWN else frozenset()
        return _Fact(a.differs or b.differs, rows, draws)

    def apply_equation(
        self, eqn: Eqn, jaxpr: Jaxpr, inputs: list[_Fact], frame: Frame
    ) -> list[_Fact]:
        return [self._fact_after(eqn, inputs, frame)] * len(eqn.outvars)

    def _fact_after(self, eqn: Eqn, inputs: list[_Fact], frame: Frame) -> _Fact:
        name, shape = name_of(eqn), eqn.outvars[0].aval.shape
        differs = any(fact.differs for fact in inputs)
        if name not in CASTS and self._axis in axes_of(eqn.params):
            differs = name not in GATHERS and name not in EQUALIZERS
            rows = any(fact.rows for fact in inputs) and bool(shape)
            return _Fact(differs, _Rows.SHARED if rows else _Rows.NOTHING)
        if name in _DRAWS:
            if differs or not shape:
                return _Fact(differs)
            draw = _describe_draw((*frame.calls, eqn), self._axis, shape)
            return _Fact(False, _Rows.DRAWN, frozenset({draw}))
        result = self._fact_of_rows(eqn, name, inputs, shape)
        if name in _PICKS and differs and result.rows is _Rows.DRAWN:
            return _Fact(differs)  # a device's own part of what all have drawn
        return self.join_facts(_Fact(differs), result)

    def _fact_of_rows(
        self, eqn: Eqn, name: str, inputs: list[_Fact], shape: tuple[int, ...]
    ) -> _Fact:
        """Return what the rows of an equation's result are; note draws that meet examples."""
        kept = []
        for i, (var, fact) in enumerate(zip(eqn.invars, inputs, strict=True)):
            if fact.rows and _keeps_rows(eqn, name, i, var.aval.shape, shape):
                kept.append(fact)
        if any(fact.rows is _Rows.EXAMPLES for fact in kept):
            self._found.update(dict.fromkeys(draw for fact in kept for draw in fact.draws))
        result = _Fact()
        for fact in kept:
            result = self.join_facts(result, fact)
        return result


def _keeps_rows(
    eqn: Eqn, name: str, i: int, given: tuple[int, ...], result: tuple[int, ...]
) -> bool:
    """Tell whether the first dim of an equation's result holds the rows of its i-th input."""
    if not given or not result:
        return False
    params = eqn.params
    match name:
        case "dot_general":
            return _keeps_rows_in_dot(params["dimension_numbers"], i, len(eqn.invars[0].aval.shape))
        case "conv_general_dilated":
            numbers = params["dimension_numbers"]
            return i == 0 and numbers.lhs_spec[0] == numbers.out_spec[0] == 0
        case "transpose":
            return params["permutation"][0] == 0
        case "broadcast_in_dim":
            return params["broadcast_dimensions"][0] == 0 and given[0] == result[0]
        case "reshape":  # (batch, time) to (batch * time), and back
            return given[0] % result[0] == 0 or result[0] % given[0] == 0
        case "gather":
            return (0 in params["dimension_numbers"].offset_dims) == (i == 0)
        case "sort":
            return params["dimension"] != 0
    if 0 in params.get("axes", ()):
        return False
    return given[0] == result[0] or (name in _OTHER_LENGTH and len(given) == len(result))


def _keeps_rows_in_dot(numbers: Any, i: int, left_dims: int) -> bool:
    contracted, batched = numbers
    if batched[0]:
        return batched[i][0] == 0
    return 0 not in contracted[i] and (i == 0 or len(contracted[0]) == left_dims)


def _describe_draw(calls: tuple[Eqn, ...], axis: str, shape: tuple[int, ...]) -> Draw:
    # jax traces its own functions once, without the lines of who called them.
    frames = next(filter(None, map(_compat.eqn_frames, reversed(calls))), ())
    own = [frame for frame in frames if "site-packages" not in frame[0]]
    inside, place = source.user_source_line(frames), source.user_source_line(own or frames)
    return Draw(axis, shape, place, "" if inside == place else inside)
