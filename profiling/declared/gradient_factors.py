"""Read from a traced step with which factor its gradients reach the parameters: mean or sum.

Types know axes and no factors: a psum of gradients in place of a pmean is legal, and N times too
large on N devices. The factor stands in the program, though. A backward pass starts from a number,
1 or a loss scale, which is multiplied by what the loss is scaled with until it is broadcast to one
number for each local example: n examples with 1/n each are a local mean. From there on everything
is linear, and what is multiplied afterwards (a loss scale's inverse, the number of microbatches)
are numbers again.

What is said is proven as far as the loss is a mean of a value for each example, or a sum divided
by the global count. All else is "not read": a factor that is computed, a constant that may be the
inverse of N, a division by N inside of the model.
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
    ADDITIVE,
    ALL_REDUCED_SUMS,
    CASTS,
    EQUALIZERS,
    GATHERS,
    MOVES,
    NOT_LINEAR,
    SUMS,
    Eqn,
    Jaxpr,
    Var,
    axes_of,
    axes_of_spec,
    made_by_autodiff,
    name_of,
    open_jaxpr,
    path_of,
)
from txcore.profiling.declared.factor_values import (
    Gradient,
    Value,
    add_gradients,
    follow_trips,
    join_ways,
    scale_gradient,
    sum_cotangents,
)
from txcore.profiling.declared.forward import Forward, Frame, find_shard_maps
from txcore.profiling.declared.monomials import ONE, Monomial
from txcore.profiling.declared.seen import counts_of, is_divided, sums_cotangents

GRADIENT = "the gradient of "  # so apply_gradients calls what it is given
DEVICES = "devices"  # the number of devices, where example_mean multiplies by it
COUNT = "count"  # a sum over the devices: of a mask
EXAMPLE_MEAN = "example_mean"  # the scope in which it computes

# Where a number for each element becomes a gradient: a product with what a loss has computed, or a
# place among zeros.
_MEETINGS = frozenset(
    ("mul", "div", "dot_general", "conv_general_dilated", "select_n", "pad", "gather")
    + ("scatter-add", "concatenate", "dynamic_update_slice", "cumsum", "transpose")
)

Factor = Literal["mean", "sum", "not read"]


@dataclass(frozen=True)
class GradientFactor:
    """How the gradient of one parameter comes to be one for all devices.

    Attributes:
      what: the parameter, "params['w']".
      factor: "mean": of what the devices have, as a plan predicts it, or a sum of shares of the
        global mean; "sum": the sum of gradients of local means, N times the mean; "not read".
      times: how often too large a "sum" is.
      shared_term: a sum holds a term that is the same on every device (weight decay in a loss),
        once for each of them.
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
        if a == b or b.is_zero:
            return replace(a, differs=a.differs or b.differs)
        if a.is_zero:
            return replace(b, differs=a.differs or b.differs)
        gradient = join_ways(a.gradient, b.gradient) if a.gradient and b.gradient else None
        is_mean, differs = a.is_mean and b.is_mean, a.differs or b.differs
        return Value(differs, None, gradient, a.reduced & b.reduced, is_mean, a.source)

    def apply_equation(
        self, eqn: Eqn, jaxpr: Jaxpr, inputs: list[Value], frame: Frame
    ) -> list[Value]:
        name = name_of(eqn)
        if name == varying.CLAIM:
            self._note_factor(eqn, inputs[0])
            return inputs
        if name in CASTS:
            return inputs
        along = [axis for axis in axes_of(eqn.params) if axis in self._axes]
        if along:
            return self._after_collective(eqn, jaxpr, name, inputs, frame)
        value = self._after_local(eqn, name, inputs, frame)
        return [self._name_scalar(eqn, value, var, frame) for var in eqn.outvars]

    def _name_scalar(self, eqn: Eqn, value: Value, var: Var, frame: Frame) -> Value:
        """Name a scalar of which nothing is known, so that its inverse cancels it."""
        aval = var.aval
        named = value.number is not None or value.gradient is not None
        if named or getattr(aval, "shape", None) != () or not _is_numeric(aval):
            return value
        return replace(value, number=_new_symbol("scalar", eqn, frame))

    # Collectives

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
            number = _new_symbol(COUNT, eqn, frame)
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

    # Operations without communication

    def _after_local(self, eqn: Eqn, name: str, inputs: list[Value], frame: Frame) -> Value:
        differs = any(value.differs for value in inputs)
        if name in MOVES and inputs:
            return inputs[0]
        if name == "select_n":
            inputs = _cases_of_select(inputs)
            if len(inputs) == 1:
                return replace(inputs[0], differs=differs)
            if not all(value.number or value.gradient for value in inputs):
                return Value(differs)
        gradients = [value for value in inputs if value.gradient is not None]
        if not gradients and not any(value.number for value in inputs):
            # What is averaged stays so while it is scaled, whatever it is.
            kept = inputs[0] if name in ("div", "mul") and inputs[0].reduced else Value()
            return replace(kept, differs=differs)
        if not gradients and all(value.number for value in inputs):
            number = self._number_after(eqn, name, inputs, frame)
            kept = inputs[0] if name in ("div", "mul") else Value()
            if number is not None or not self._starts_gradient(eqn, name, inputs, frame):
                return replace(kept, number=number, differs=differs)
        path = path_of(eqn, frame.path)
        if not made_by_autodiff(path):
            value = self._value_of_gradients(name, inputs, gradients)
            if not gradients and name in ("div", "mul") and inputs[0].reduced:
                value = replace(inputs[0], number=None)
            return replace(value, differs=differs)
        if gradients:
            return Value(differs, gradient=self._gradient_passed_back(name, inputs, gradients))
        if self._starts_gradient(eqn, name, inputs, frame):
            return Value(differs, gradient=_start_gradient(eqn, inputs))
        return Value(differs)

    def _starts_gradient(self, eqn: Eqn, name: str, inputs: list[Value], frame: Frame) -> bool:
        """Tell whether a number for each element meets something here that is none.

        A backward function that is written by hand has constants too: they meet values otherwise.
        """
        if name not in _MEETINGS or not any(
            _is_started(*pair) for pair in _pair_inputs(eqn, inputs)
        ):
            return False
        return made_by_autodiff(path_of(eqn, frame.path))

    def _number_after(
        self, eqn: Eqn, name: str, inputs: list[Value], frame: Frame
    ) -> Monomial | None:
        numbers = [value.number for value in inputs if value.number is not None]
        if name in ("mul", "div") and EXAMPLE_MEAN in path_of(eqn, frame.path):
            numbers = [self._named_devices(number) for number in numbers]
        match name, numbers:
            case "mul", [a, b]:
                return a.times(b)
            case "div", [a, b] if b.constant:
                return a.over(b)
            case "neg", [a]:
                return a.times(Monomial(-1.0))
            case "reduce_sum", [a]:
                count = eqn.invars[0].aval.size // max(eqn.outvars[0].aval.size, 1)
                return a.times(Monomial(float(count)))
            case (("add" | "add_any"), [a, b]) if not (a.powers or b.powers):
                return Monomial(a.constant + b.constant)
            case (("add" | "add_any"), [a, b]) if not (a.constant and b.constant):
                return a if a.constant else b
        counts = any(number.has_kind(COUNT) for number in numbers)
        scalar = eqn.outvars[0].aval.shape == () and _is_numeric(eqn.outvars[0].aval)
        if counts and scalar and name in ("select_n", "max"):  # the count, or 1 where it is 0
            return _new_symbol(COUNT, eqn, frame)
        return None

    def _named_devices(self, number: Monomial) -> Monomial:
        if number == Monomial(float(self._devices)):
            return Monomial(1.0, frozenset({(DEVICES, 1)}))
        return number

    def _gradient_passed_back(
        self, name: str, inputs: list[Value], gradients: list[Value]
    ) -> Gradient | None:
        """Return what autodiff makes of gradients: it keeps all weights, for each example's own."""
        if name in NOT_LINEAR:
            return None
        first, *others = [value.gradient for value in gradients if value.gradient is not None]
        if name in ADDITIVE or name in ("select_n", "scatter-add", "dynamic_update_slice", "stack"):
            for other in others:
                first = join_ways(first, other)
            terms = [v for v in inputs if v.gradient is None and not v.is_zero]
            if not terms or name not in ("add", "add_any", "sub", "select_n"):
                return first
            is_shared = all(v.number is not None and not v.differs for v in terms)
            return replace(first, shared=True) if is_shared else replace(first, weight=None)
        numbers = [value.number for value in inputs if value.gradient is None and value.number]
        if others or any(self._may_be_a_mean(number) for number in numbers):
            return replace(first, weight=None)
        return first

    def _may_be_a_mean(self, number: Monomial) -> bool:
        """Tell whether a number inside of a model is N or 1/N: someone may have divided there."""
        return not number.powers and (
            math.isclose(abs(number.constant), self._devices)
            or math.isclose(abs(number.constant) * self._devices, 1)
        )

    def _value_of_gradients(self, name: str, inputs: list[Value], gradients: list[Value]) -> Value:
        """Return what a step makes of gradients that it has got."""
        if not gradients:
            return Value()
        first = gradients[0]
        others = [value for value in inputs if value is not first and not value.is_zero]
        gradient = first.gradient
        assert gradient is not None
        match name, others:
            case "add" | "add_any", []:  # to zeros
                return first
            case (("add" | "add_any"), [other]):
                return add_gradients(first, other)
            case "mul", [other] if other.number is not None:
                return replace(first, gradient=scale_gradient(gradient, other.number))
            case "div", [other] if other.number is not None and first is inputs[0]:
                inverse = ONE.over(other.number) if other.number.constant else None
                return replace(first, gradient=scale_gradient(gradient, inverse))
            case (("concatenate" | "pad" | "select_n" | "dynamic_update_slice"), _):
                value = first
                for other in others:
                    value = self.join_facts(value, other) if other.gradient else value
                return value
            case (("slice" | "dynamic_slice" | "gather" | "split"), _) if first is inputs[0]:
                return first
            case (("add" | "add_any" | "sub" | "neg" | "mul" | "div" | "reduce_sum"), _):
                return replace(first, gradient=scale_gradient(gradient, None))
        return Value()

    def run_loop(
        self, step: Callable[[list[Value]], list[Value]], carry: list[Value], trips: int | None
    ) -> list[Value]:
        """Go through two trips of a loop, and add what each adds to the weight of a gradient."""
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
        """Return the factor of a gradient, and how often it is too large."""
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
    if var.aval.shape != () or not _is_numeric(var.aval):
        return Value(differs)
    return Value(differs, number=Monomial(1.0, frozenset({(("scalar", id(var)), 1)})))


def _is_numeric(aval: object) -> bool:
    return getattr(getattr(aval, "dtype", None), "kind", "") in "fiuV"


def _new_symbol(kind: str, eqn: Eqn, frame: Frame) -> Monomial:
    # One jaxpr may stand in several calls: what it computes has another name in each.
    return Monomial(1.0, frozenset({((kind, tuple(map(id, frame.calls)), id(eqn)), 1)}))


def _cases_of_select(inputs: list[Value]) -> list[Value]:
    """Return what a select may choose, but zeros: those are left out of a sum."""
    cases = list(dict.fromkeys(value for value in inputs[1:] if not value.is_zero))
    return cases or inputs[1:2]


def _pair_inputs(eqn: Eqn, inputs: list[Value]) -> list[tuple[Var, Value]]:
    return list(zip(eqn.invars[-len(inputs) :], inputs, strict=True))


def _is_started(var: Var, value: Value) -> bool:
    return value.number is not None and not value.is_zero and bool(var.aval.shape)


def _start_gradient(eqn: Eqn, inputs: list[Value]) -> Gradient | None:
    """Return the gradient that a backward pass's number for each element turns into."""
    var, value = next(pair for pair in _pair_inputs(eqn, inputs) if _is_started(*pair))
    number = value.number
    if number is None:
        return None
    others = [one for one in inputs if one is not value]
    local = any(one.differs for one in others) or not others
    counted = number.has_kind(COUNT)
    weight = number if counted else number.times(Monomial(float(var.aval.size)))
    return Gradient(weight, counted, local=local, shared=not local)
