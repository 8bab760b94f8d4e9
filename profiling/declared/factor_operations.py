"""Follow numbers and gradients through the operations that do not communicate.

Numbers are monomials. Gradients come from a backward pass: inside of it autodiff keeps each
example's weight, and after it the step scales and adds them.
"""

import math
from dataclasses import replace

from txcore.profiling.declared.equations import (
    ADDITIVE,
    MOVES,
    NOT_LINEAR,
    Eqn,
    Var,
    made_by_autodiff,
    path_of,
)
from txcore.profiling.declared.factor_values import (
    ONE,
    Gradient,
    Monomial,
    Value,
    add_gradients,
    join_values,
    join_ways,
    scale_gradient,
)
from txcore.profiling.declared.forward import Frame

DEVICES = "devices"  # the number of devices, where example_mean multiplies by it
COUNT = "count"  # a sum over the devices: of a mask
EXAMPLE_MEAN = "example_mean"  # the scope in which it computes

# Where a number for each element becomes a gradient: a product with what a loss has computed, or a
# place among zeros.
_MEETINGS = frozenset(
    ("mul", "div", "dot_general", "conv_general_dilated", "select_n", "pad", "gather")
    + ("scatter-add", "concatenate", "dynamic_update_slice", "cumsum", "transpose")
)


_KEEP_MEANS = ("div", "mul", "split", "slice")


def value_after(eqn: Eqn, name: str, inputs: list[Value], frame: Frame, devices: int) -> Value:
    """Return what is known of the result of an operation that does not communicate.

    Args:
      eqn: the operation.
      name: the name of its primitive.
      inputs: what is known of its operands.
      frame: what stands around it.
      devices: the number of devices along the data axes.
    """
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
        # What is averaged stays so while it is scaled or taken apart, whatever it is.
        kept = inputs[0] if name in _KEEP_MEANS and inputs[0].reduced else Value()
        return replace(kept, differs=differs)
    if not gradients and all(value.number for value in inputs):
        number = _number_after(eqn, name, inputs, frame, devices)
        kept = inputs[0] if name in ("div", "mul") else Value()
        if number is not None or not _starts_gradient(eqn, name, inputs, frame):
            return replace(kept, number=number, differs=differs)
    path = path_of(eqn, frame.path)
    # What is reduced is no cotangent any more, as after the backward pass of a gather of shards.
    if not made_by_autodiff(path) or any(value.reduced for value in gradients):
        value = _value_of_gradients(name, inputs, gradients)
        if not gradients and name in ("div", "mul") and inputs[0].reduced:
            value = replace(inputs[0], number=None)
        return replace(value, differs=differs)
    if gradients:
        return Value(differs, gradient=_gradient_passed_back(name, inputs, gradients, devices))
    if _starts_gradient(eqn, name, inputs, frame):
        return Value(differs, gradient=_start_gradient(eqn, inputs))
    return Value(differs)


def _starts_gradient(eqn: Eqn, name: str, inputs: list[Value], frame: Frame) -> bool:
    """Tell whether a gradient starts here: a number for each element meets a value.

    A backward function written by hand has constants too, but they meet values in other ways.
    """
    if name not in _MEETINGS or not any(_is_started(*pair) for pair in _pair_inputs(eqn, inputs)):
        return False
    return made_by_autodiff(path_of(eqn, frame.path))


def _number_after(
    eqn: Eqn, name: str, inputs: list[Value], frame: Frame, devices: int
) -> Monomial | None:
    numbers = [value.number for value in inputs if value.number is not None]
    if name in ("mul", "div") and EXAMPLE_MEAN in path_of(eqn, frame.path):
        numbers = [_named_devices(number, devices) for number in numbers]
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
    scalar = eqn.outvars[0].aval.shape == () and is_numeric(eqn.outvars[0].aval)
    if counts and scalar and name in ("select_n", "max"):  # the count, or 1 where it is 0
        return new_symbol(COUNT, eqn, frame)
    return None


def _named_devices(number: Monomial, devices: int) -> Monomial:
    if number == Monomial(float(devices)):
        return Monomial(1.0, frozenset({(DEVICES, 1)}))
    return number


def _gradient_passed_back(
    name: str, inputs: list[Value], gradients: list[Value], devices: int
) -> Gradient | None:
    """Return the gradient after a step of a backward pass: autodiff keeps each example's weight."""
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
    if others or any(_may_be_a_mean(number, devices) for number in numbers):
        return replace(first, weight=None)
    return first


def _may_be_a_mean(number: Monomial, devices: int) -> bool:
    """Tell whether a number inside of a model is N or 1/N: the model may divide by N there."""
    return not number.powers and (
        math.isclose(abs(number.constant), devices)
        or math.isclose(abs(number.constant) * devices, 1)
    )


def _value_of_gradients(name: str, inputs: list[Value], gradients: list[Value]) -> Value:
    """Return the facts about gradients after an operation of the step itself."""
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
                value = join_values(value, other) if other.gradient else value
            return value
        case (("slice" | "dynamic_slice" | "gather" | "split"), _) if first is inputs[0]:
            return first
        case (("add" | "add_any" | "sub" | "neg" | "mul" | "div" | "reduce_sum"), _):
            return replace(first, gradient=scale_gradient(gradient, None))
    return Value()


def is_numeric(aval: object) -> bool:
    """Tell whether an array type holds integers or floats."""
    return getattr(getattr(aval, "dtype", None), "kind", "") in "fiuV"


def new_symbol(kind: str, eqn: Eqn, frame: Frame) -> Monomial:
    """Return a monomial that names an unknown scalar."""
    # One jaxpr may stand in several calls: what it computes has another name in each.
    return Monomial(1.0, frozenset({((kind, tuple(map(id, frame.calls)), id(eqn)), 1)}))


def _cases_of_select(inputs: list[Value]) -> list[Value]:
    """Return the distinct cases of a select without zeros, which add nothing to a sum."""
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
