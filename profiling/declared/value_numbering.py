"""Number the values of a traced program, so that equal ones have equal numbers.

The compiler's common subexpression elimination merges two collectives of equal operands; equal
numbers tell which. Source: Briggs, Cooper, Simpson, "Value Numbering", 1997.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from txcore import _compat
from txcore.profiling.declared.equations import Eqn, Jaxpr, Var, open_jaxpr

_COMMUTE = ("add", "mul", "max", "min", "and", "or", "xor")


@dataclass(frozen=True, slots=True)
class Value:
    """One value: its `number`, and whether it depends on the program's inputs."""

    number: int
    depends: bool


@dataclass(frozen=True, slots=True)
class Numbering:
    """The numbers given so far, by what computes them."""

    known: dict[Any, int] = field(default_factory=dict)
    counter: "itertools.count[int]" = field(default_factory=itertools.count)

    def new_value(self, depends: bool) -> Value:
        """Return a value that equals no other."""
        return Value(next(self.counter), depends)

    def number_results(self, eqn: Eqn, inputs: Sequence[Value]) -> list[Value]:
        """Return the values of an equation's outputs, from those of its inputs."""
        name = eqn.primitive.name
        depends = any(v.depends for v in inputs) or name == "axis_index"
        numbers = [v.number for v in inputs]
        if name in _COMMUTE:
            numbers.sort()
        key = (name, _freeze_params(eqn.params), tuple(numbers))
        return [Value(self._number_of((key, i)), depends) for i in range(len(eqn.outvars))]

    def number_shard(self, value: Value, spec: Any) -> Value:
        """Return the value of one device's shard of an array."""
        return Value(self._number_of(("shard", str(spec), value.number)), value.depends)

    def number_literal(self, var: Var) -> Value:
        """Return the value of a constant written into an equation."""
        content = np.asarray(var.val)
        is_small = content.size <= 1 and content.dtype != object
        key = (str(var.aval), content.tobytes()) if is_small else id(var.val)
        return Value(self._number_of(("literal", key)), False)

    def number_inputs(self, eqn: Eqn, inner: Jaxpr, inputs: Sequence[Value]) -> dict[Var, Value]:
        """Return the values of a jaxpr's inputs: a call's are the outer ones, a loop's new."""
        name = eqn.primitive.name
        values = list(inputs)
        if name == "shard_map":
            specs = eqn.params["in_specs"]
            values = [self.number_shard(v, spec) for v, spec in zip(inputs, specs, strict=True)]
        elif len(inner.invars) != len(inputs) or name in ("scan", "while"):
            depends = any(v.depends for v in inputs)
            constants = _loop_constants(eqn, inner, inputs)
            carried = len(inner.invars) - len(constants)
            values = [*constants, *(self.new_value(depends) for _ in range(carried))]
        known = dict(zip(inner.invars, values, strict=True))
        return known | {v: self.new_value(depends=False) for v in inner.constvars}

    def _number_of(self, key: Any) -> int:
        number = self.known.get(key)
        if number is None:
            number = self.known[key] = next(self.counter)
        return number


def _loop_constants(eqn: Eqn, inner: Jaxpr, inputs: Sequence[Value]) -> Sequence[Value]:
    """Return a loop's constants, which come first among its body's inputs."""
    if eqn.primitive.name == "scan":
        return inputs[: _compat.scan_counts(eqn)[0]]
    if eqn.primitive.name == "while":
        of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        is_cond = inner is open_jaxpr(eqn.params["cond_jaxpr"])
        return inputs[:of_cond] if is_cond else inputs[of_cond : of_cond + of_body]
    return ()


def _freeze_params(params: dict[str, Any]) -> Any:
    values = tuple(params.values())
    try:
        hash(values)
    except TypeError:  # one that is not hashable equals itself alone; jax shares equal jaxprs
        return tuple(map(_identity_of, values))
    return values


def _identity_of(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
