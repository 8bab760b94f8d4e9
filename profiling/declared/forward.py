"""Run a traced program forward on facts about its values, through calls, branches and loops."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from txcore import _compat
from txcore.profiling.declared.collectives import path_of, sub_jaxprs
from txcore.profiling.declared.value_numbering import is_literal

# They change along which axes a value is typed as varying, and no value.
CASTS = ("pvary", "pcast", "vary_unreduced_cast")
Fact = TypeVar("Fact")
Calls = tuple[Any, ...]


def path_in(calls: Calls, eqn: Any) -> str:
    """Return the jax transformations that made an equation inside of other ones."""
    path = ""
    for outer in (*calls, eqn):
        path = path_of(outer, path)
    return path


class Forward(Generic[Fact]):
    """Give each value of a jaxpr a fact, from the facts of the inputs.

    Facts are hashable and have a largest one: `join` of two is at least each of them.
    """

    def __init__(
        self,
        rule: Callable[[Any, Sequence[Fact], Calls], Fact],
        join: Callable[[Fact, Fact], Fact],
        nothing: Fact,
    ) -> None:
        """Start with no facts.

        Args:
          rule: takes an equation that holds no jaxprs, the facts of its inputs, and the equations
            (calls, loops) inside of which it stands; returns the fact of its outputs.
          join: the fact of a value that may be either of two.
          nothing: the fact of constants.
        """
        self._rule, self._join, self._nothing = rule, join, nothing

    def run(self, jaxpr: Any, inputs: Sequence[Fact], calls: Calls = ()) -> list[Fact]:
        """Return the facts of a jaxpr's outputs."""
        known: dict[Any, Fact] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(var: Any) -> Fact:
            return self._nothing if is_literal(var) else known.get(var, self._nothing)

        for eqn in jaxpr.eqns:
            facts = [read(v) for v in eqn.invars]
            known.update(zip(eqn.outvars, self._eqn(eqn, facts, calls), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _eqn(self, eqn: Any, facts: list[Fact], calls: Calls) -> list[Fact]:
        inner = [getattr(j, "jaxpr", j) for j in sub_jaxprs(eqn)]
        if not inner:
            return [self._rule(eqn, facts, calls)] * len(eqn.outvars)
        calls = (*calls, eqn)
        match eqn.primitive.name:
            case "scan":
                consts, carried = _compat.scan_counts(eqn)
                return self._loop(inner[0], facts[:consts], facts[consts:], carried, calls)
            case "while":
                skip, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
                body, facts = eqn.params["body_jaxpr"].jaxpr, facts[skip:]
                carried = len(facts) - consts
                return self._loop(body, facts[:consts], facts[consts:], carried, calls)
            case "cond":
                return self._either([self.run(branch, facts[1:], calls) for branch in inner])
        body = inner[0]
        if len(inner) == 1 and len(body.invars) == len(facts):
            outputs = self.run(body, facts, calls)
            if len(outputs) == len(eqn.outvars):
                return outputs
        # What reaches a linear solve's or a scatter's functions is not known here.
        everything = self._all(facts)
        results = [self.run(j, [everything] * len(j.invars), calls) for j in inner]
        joined = [self._all(facts) for facts in results]
        return [self._all([everything, *joined])] * len(eqn.outvars)

    def _loop(
        self, body: Any, fixed: list[Fact], rest: list[Fact], carried: int, calls: Calls
    ) -> list[Fact]:
        """Repeat a body, whose first outputs are its carry, until the carry's facts settle."""
        carry, scanned = rest[:carried], rest[carried:]
        while True:
            outputs = self.run(body, [*fixed, *carry, *scanned], calls)
            settled = self._either([carry, outputs[:carried]])
            if settled == carry:
                return [*carry, *outputs[carried:]]
            carry = settled

    def _either(self, results: Sequence[Sequence[Fact]]) -> list[Fact]:
        return [self._all(facts) for facts in zip(*results, strict=True)]

    def _all(self, facts: Sequence[Fact]) -> Fact:
        joined = self._nothing
        for fact in facts:
            joined = self._join(joined, fact)
        return joined
