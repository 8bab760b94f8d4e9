"""Read from a traced step with which factor its gradients reach the parameters: mean or sum.

Types hold axes but no factors: a psum of gradients in place of a pmean is legal, and N times too
large on N devices. The program holds the factor, though. A backward pass starts from a number, 1 or
a loss scale. The loss's own factors multiply it until it is broadcast to one number for each local
example: n examples with 1/n each are a local mean. From there on everything is linear, and the
later factors (a loss scale's inverse, the number of microbatches) are numbers again.

The answer is proven where the loss is a mean of one value an example, or a sum divided by the
global count. It is "not read" elsewhere: for a computed factor, a constant that may be the inverse
of N, a division by N inside of the model.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from txcore import _compat, tags, varying
from txcore.profiling import meshes
from txcore.profiling.declared import source
from txcore.profiling.declared.equations import (
    ALL_REDUCED_SUMS,
    CASTS,
    EQUALIZERS,
    GATHERS,
    SUMS,
    Eqn,
    Jaxpr,
    Var,
    axes_of,
    axes_of_spec,
    name_of,
    open_jaxpr,
    path_of,
)
from txcore.profiling.declared.factor_operations import (
    COUNT,
    DEVICES,
    is_numeric,
    new_symbol,
    value_after,
)
from txcore.profiling.declared.factor_values import (
    Gradient,
    Monomial,
    Value,
    follow_trips,
    join_values,
    sum_cotangents,
)
from txcore.profiling.declared.forward import Forward, Frame, find_shard_maps
from txcore.profiling.declared.seen import counts_of, is_divided, sums_cotangents

GRADIENT = "the gradient of "  # so apply_gradients calls what it is given

Factor = Literal["mean", "sum", "not read"]


@dataclass(frozen=True)
class GradientFactor:
    """How the devices' gradients of one parameter become one.

    Attributes:
      what: the parameter, "params['w']".
      factor: "mean": the mean over the devices, as a plan predicts it, or a sum of shares of the
        global mean; "sum": the sum of gradients of local means, N times the mean; "not read".
      times: by which factor a "sum" is too large.
      shared_term: whether a sum counts a term that is the same on every device (weight decay in a
        loss) once for each of them.
      source: "file.py:12" of the reduction, "" where there is none.
    """

    what: str
    factor: Factor
    times: int = 1
    shared_term: bool = False
    source: str = ""


def read_gradient_factors(jaxpr: Jaxpr, axes: Iterable[str]) -> list[GradientFactor]:
    """Read with which factor each gradient reaches `apply_gradients`.

    Args:
      jaxpr: a Jaxpr or ClosedJaxpr of a step, one shard_map.
      axes: the axes along which the plan predicts the mean of local gradients.

    Returns:
      One for each parameter that is given a gradient, in order; none of those whose gradient is
      zero.
    """
    found: list[GradientFactor] = []
    for eqn, frame in find_shard_maps(jaxpr):
        sizes = dict(meshes.sizes_of(eqn.params["mesh"]))
        data = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
        if data:
            walk, body = _Factors(data, sizes), open_jaxpr(eqn.params["jaxpr"])
            specs = zip(eqn.params["in_specs"], body.invars, strict=True)
            walk.run_jaxpr(body, [_value_of_input(spec, var, data) for spec, var in specs], frame)
            found += walk.found.values()
    return found


class _Factors(Forward[Value]):
    """Follow numbers and gradients; `found` by the parameter."""

    def __init__(self, axes: tuple[str, ...], sizes: dict[str, int]) -> None:
        self.found: dict[str, GradientFactor] = {}
        self._axes, self._sizes = axes, sizes
        self._devices = math.prod(sizes[axis] for axis in axes)

    def of_literal(self, var: Var) -> Value:
        content = np.asarray(var.val)
        is_number = content.size == 1 and content.dtype.kind in "fiu"
        return Value(number=Monomial(float(content.reshape(())))) if is_number else Value()

    def of_constant(self) -> Value:
        return Value()

    def join_facts(self, a: Value, b: Value) -> Value:
        return join_values(a, b)

    def apply_equation(
        self, eqn: Eqn, jaxpr: Jaxpr, inputs: list[Value], frame: Frame
    ) -> list[Value]:
        name = name_of(eqn)
        if name == varying.CLAIM:
            self._note_factor(eqn, inputs[0])
            return [self._after_claim(eqn, value) for value in inputs]
        if name in CASTS:
            return inputs
        along = [axis for axis in axes_of(eqn.params) if axis in self._axes]
        if along:
            return self._after_collective(eqn, jaxpr, name, inputs, frame)
        value = value_after(eqn, name, inputs, frame, self._devices)
        return [self._name_scalar(eqn, value, var, frame) for var in eqn.outvars]

    def _after_claim(self, eqn: Eqn, value: Value) -> Value:
        along = frozenset(eqn.params["mesh_axes"]) & frozenset(self._axes)
        kind = eqn.params["kind"]
        if kind == varying.GATHERED and along:
            return replace(value, differs=False) if value.reduced else Value()
        if kind not in (varying.MEAN, varying.MEAN_SHARD, varying.SUM) or not along:
            return value
        place = source.user_source_line(_compat.eqn_frames(eqn))
        # An exchange of several steps hides the weights of what went in.
        gradient = value.gradient or Gradient(weight=None)
        differs, reduced = kind == varying.MEAN_SHARD, value.reduced | along
        is_mean = kind != varying.SUM
        return Value(differs, gradient=gradient, reduced=reduced, is_mean=is_mean, source=place)

    def _name_scalar(self, eqn: Eqn, value: Value, var: Var, frame: Frame) -> Value:
        """Name an unknown scalar, so that its inverse cancels it."""
        aval = var.aval
        named = value.number is not None or value.gradient is not None
        if named or getattr(aval, "shape", None) != () or not is_numeric(aval):
            return value
        return replace(value, number=new_symbol("scalar", eqn, frame))

    def _after_collective(
        self, eqn: Eqn, jaxpr: Jaxpr, name: str, inputs: list[Value], frame: Frame
    ) -> list[Value]:
        if name == "axis_index":
            return [Value(differs=True)]
        axes = axes_of(eqn.params)
        path = path_of(eqn, frame.path)
        if len(inputs) != len(eqn.outvars) or eqn.params.get("axis_index_groups") is not None:
            return [Value(differs=True)] * len(eqn.outvars)
        if sums_cotangents(name, path):
            size = math.prod(self._sizes.get(axis, 1) for axis in axes)
            return [sum_cotangents(value, name, size) for value in inputs]
        if name in SUMS or name in ALL_REDUCED_SUMS:
            pairs = zip(inputs, eqn.outvars, strict=True)
            return [self._after_sum(eqn, jaxpr, value, var, path, frame) for value, var in pairs]
        if name in GATHERS:  # of what is summed, in shards: else of one gradient for each device
            return [replace(v, differs=False) if v.reduced else Value() for v in inputs]
        return [Value(differs=name not in EQUALIZERS)] * len(eqn.outvars)

    def _after_sum(
        self, eqn: Eqn, jaxpr: Jaxpr, value: Value, var: Var, path: str, frame: Frame
    ) -> Value:
        axes, name = axes_of(eqn.params), name_of(eqn)
        differs = name == "reduce_scatter"
        if value.is_zero:
            return value
        number = None
        if value.gradient is None and var.aval.shape == ():
            number = new_symbol(COUNT, eqn, frame)
        by_tag = (tags.tag_in(path) or "").split("/")[0] == "pmean"
        is_mean = by_tag or any(
            is_divided(jaxpr, var, counts_of(axes, axis, self._sizes)) for axis in axes
        )
        along = frozenset(axes) & frozenset(self._axes)
        gradient = value.gradient
        if gradient is not None and value.reduced & along:
            gradient = replace(gradient, weight=None)
        place = source.user_source_line(_compat.eqn_frames(eqn))
        is_mean = is_mean and value.is_mean
        return Value(differs, number, gradient, value.reduced | along, is_mean, place)

    def run_loop(
        self, step: Callable[[list[Value]], list[Value]], carry: list[Value], trips: int | None
    ) -> list[Value]:
        """Follow two trips of a loop, and extend what each adds to a gradient's weight to all."""
        first = step(carry)
        if trips == 1 or first[: len(carry)] == carry:
            return first
        second = step(first[: len(carry)])
        after = [
            follow_trips(*values, trips)
            for values in zip(carry, first[: len(carry)], second[: len(carry)], strict=True)
        ]
        stacked = zip(first[len(carry) :], second[len(carry) :], strict=True)
        return [*after, *(self.join_facts(a, b) for a, b in stacked)]

    def _note_factor(self, eqn: Eqn, value: Value) -> None:
        what = eqn.params["what"]
        if eqn.params["kind"] != "equal" or not what.startswith(GRADIENT) or value.is_zero:
            return
        name = what.removeprefix(GRADIENT)
        size = math.prod(self._sizes[axis] for axis in value.reduced)
        read = self._read_factor(value, size)
        shared = value.gradient is not None and value.gradient.shared and not value.is_mean
        found = GradientFactor(name, *read, shared_term=shared, source=value.source)
        before = self.found.get(name, found)
        self.found[name] = found if found == before else GradientFactor(name, "not read")

    def _read_factor(self, value: Value, size: int) -> tuple[Factor, int]:
        """Return the factor of a gradient, and by which number it is too large."""
        if value.reduced and value.is_mean:
            return "mean", 1
        gradient = value.gradient
        if not value.reduced or gradient is None or gradient.weight is None or not gradient.local:
            return "not read", 1
        weight = gradient.weight
        if gradient.counted:  # of each example: the inverse of the count is right
            right = weight.without_kind(COUNT, -1)
            known = right is not None and right.powers <= {(DEVICES, 1)}
            if right is None or not known or not (right.powers or right.constant == 1):
                return "not read", 1
            times = right.constant * (size if right.powers else 1)
        elif weight.powers:
            return "not read", 1
        else:
            times = weight.constant * size
        if math.isclose(times, 1, rel_tol=1e-5):
            # Half a mean, as a regression has it, looks like a share on two devices.
            return ("mean" if gradient.counted or size > 2 else "not read"), 1
        return ("sum", size) if math.isclose(times, size, rel_tol=1e-5) else ("not read", 1)


def _value_of_input(spec: Sequence[object], var: Var, axes: tuple[str, ...]) -> Value:
    differs = any(axis in axes for axis in axes_of_spec(spec))
    if var.aval.shape != () or not is_numeric(var.aval):
        return Value(differs)
    return Value(differs, number=Monomial(1.0, frozenset({(("scalar", id(var)), 1)})))
