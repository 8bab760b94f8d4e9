"""Run a traced program forward on facts about its values, through calls, branches and loops."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from txcore import _compat
from txcore.profiling.declared.equations import (
    PLAIN,
    Eqn,
    Jaxpr,
    Var,
    is_literal,
    open_jaxpr,
    path_of,
    sub_jaxprs,
)

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Frame:
    """The surroundings of an equation.

    Attributes:
      calls: the equations (calls, loops, branches) around it, outermost first.
      path: the jax transformations that made those.
      tracked: whether jax's types say along which axes values vary here.
      under: the innermost cond or while around whose predicate splits the devices, or None.
    """

    calls: tuple[Eqn, ...] = ()
    path: str = ""
    tracked: bool = True
    under: Eqn | None = None

    def enter_equation(self, eqn: Eqn) -> "Frame":
        """Return the frame of what an equation holds."""
        tracked = self.tracked
        if eqn.primitive.name == "shard_map":
            tracked = bool(eqn.params.get("check_vma", False))
        calls, path = (*self.calls, eqn), path_of(eqn, self.path)
        return replace(self, calls=calls, path=path, tracked=tracked)


class Forward(Generic[Fact]):
    """Give each value of a jaxpr a fact, from the facts of the inputs.

    A subclass defines the facts of literals, of operations' results and of two values joined; this
    class follows calls, branches and loops. Facts are hashable, and a join is an upper bound of
    both, so that a loop's carry settles.
    """

    def of_literal(self, var: Var) -> Fact:
        """Return the fact of a constant that is written into an equation."""
        raise NotImplementedError

    def of_constant(self) -> Fact:
        """Return the fact of a constant that a jaxpr holds beside its equations."""
        raise NotImplementedError

    def join_facts(self, a: Fact, b: Fact) -> Fact:
        """Return the fact of a value that may be either of two."""
        raise NotImplementedError

    def apply_equation(
        self, eqn: Eqn, jaxpr: Jaxpr, inputs: list[Fact], frame: Frame
    ) -> list[Fact]:
        """Return the facts of the outputs of an equation that holds no jaxpr."""
        raise NotImplementedError

    def mix_inputs(self, eqn: Eqn, inputs: Sequence[Fact]) -> Fact:
        """Return a fact of anything that a call which is not followed may compute."""
        return self._join_all(inputs) if inputs else self.of_constant()

    def splits_devices(self, predicate: Fact) -> bool:
        """Tell whether a predicate may send devices different ways."""
        return False

    def choose_by(self, value: Fact, predicate: Fact) -> Fact:
        """Return the fact of a value that a predicate has chosen."""
        return value

    def enter_loop(self, fact: Fact) -> Fact:
        """Return the fact of a value as a loop's body gets it, as its carry or one slice of it."""
        return fact

    def leave_equation(self, eqn: Eqn, outputs: list[Fact], inputs: Sequence[Fact]) -> list[Fact]:
        """Return the facts of the outputs of an equation that holds jaxprs, as seen outside."""
        return outputs

    def see_equation(
        self,
        eqn: Eqn,
        jaxpr: Jaxpr,
        inputs: list[Fact],
        outputs: list[Fact],
        frame: Frame,
        splits: bool = False,
    ) -> None:
        """Look at an equation with its facts; an equation in a loop is seen several times."""

    def run_jaxpr(self, jaxpr: Jaxpr, inputs: Sequence[Fact], frame: Frame) -> list[Fact]:
        """Return the facts of a jaxpr's outputs."""
        known: dict[Var, Fact] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read_fact(var: Var) -> Fact:
            if is_literal(var):
                return self.of_literal(var)
            return known[var] if var in known else self.of_constant()

        for eqn in jaxpr.eqns:
            facts = [read_fact(v) for v in eqn.invars]
            inner = () if eqn.primitive.name in PLAIN else sub_jaxprs(eqn)
            if eqn.primitive.name == "optimization_barrier":
                outputs = facts  # each of its results is one of its operands
            elif inner:
                outputs = self._run_inner(eqn, inner, jaxpr, facts, frame)
            else:
                outputs = self.apply_equation(eqn, jaxpr, facts, frame)
                self.see_equation(eqn, jaxpr, facts, outputs, frame)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [read_fact(v) for v in jaxpr.outvars]

    def _run_inner(
        self, eqn: Eqn, inner: Sequence[Jaxpr], jaxpr: Jaxpr, facts: list[Fact], around: Frame
    ) -> list[Fact]:
        frame, splits = around.enter_equation(eqn), False
        match eqn.primitive.name:
            case "scan":
                outputs = self._run_scan(eqn, inner[0], facts, frame)
            case "while":
                outputs, splits = self._run_while(eqn, facts, frame)
            case "cond":
                outputs, splits = self._run_cond(eqn, inner, facts, frame)
            case _:
                outputs = self._run_call(eqn, inner, facts, frame)
        outputs = self.leave_equation(eqn, outputs, facts)
        self.see_equation(eqn, jaxpr, facts, outputs, around, splits)
        return outputs

    def _run_call(
        self, eqn: Eqn, inner: Sequence[Jaxpr], facts: list[Fact], frame: Frame
    ) -> list[Fact]:
        """Go through a call with one body of the same arguments (jit, remat, custom_vjp...)."""
        body = inner[0]
        fits = len(body.invars) == len(facts) and len(body.outvars) == len(eqn.outvars)
        if len(inner) == 1 and fits:
            return self.run_jaxpr(body, facts, frame)
        # The inputs of a scatter's combiner or a linear solve's functions are not known here.
        mixed = self.mix_inputs(eqn, facts)
        for body in inner:
            mixed = self._join_all(
                [mixed, *self.run_jaxpr(body, [mixed] * len(body.invars), frame)]
            )
        return [mixed] * len(eqn.outvars)

    def _run_scan(self, eqn: Eqn, body: Jaxpr, facts: list[Fact], frame: Frame) -> list[Fact]:
        consts, carried = _compat.scan_counts(eqn)
        fixed, carry = facts[:consts], facts[consts : consts + carried]
        slices = [self.enter_loop(fact) for fact in facts[consts + carried :]]

        def run_trip(carry: list[Fact]) -> list[Fact]:
            return self.run_jaxpr(body, [*fixed, *carry, *slices], frame)

        return self.run_loop(
            run_trip, [self.enter_loop(c) for c in carry], int(eqn.params["length"])
        )

    def _run_while(self, eqn: Eqn, facts: list[Fact], frame: Frame) -> tuple[list[Fact], bool]:
        of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond, body = open_jaxpr(eqn.params["cond_jaxpr"]), open_jaxpr(eqn.params["body_jaxpr"])
        fixed, carry = facts[of_cond : of_cond + of_body], facts[of_cond + of_body :]
        settled = self.run_loop(
            lambda c: self.run_jaxpr(body, [*fixed, *c], frame),
            [self.enter_loop(c) for c in carry],
            None,
        )
        (predicate,) = self.run_jaxpr(cond, [*facts[:of_cond], *settled], frame)
        splits = self.splits_devices(predicate)
        if splits:  # known only now: what is inside has to be seen again, under it
            inside = replace(frame, under=eqn)
            self.run_jaxpr(cond, [*facts[:of_cond], *settled], inside)
            self.run_jaxpr(body, [*fixed, *settled], inside)
        handed_on = _carried_along(body, of_body)
        return self._choose_all(settled, handed_on, predicate), splits

    def _run_cond(
        self, eqn: Eqn, branches: Sequence[Jaxpr], facts: list[Fact], frame: Frame
    ) -> tuple[list[Fact], bool]:
        predicate, *operands = facts
        splits = self.splits_devices(predicate)
        inside = replace(frame, under=eqn) if splits else frame
        results = [self.run_jaxpr(branch, operands, inside) for branch in branches]
        outputs = [self._join_all(facts) for facts in zip(*results, strict=True)]
        return self._choose_all(outputs, _chosen_alike(branches), predicate), splits

    def _choose_all(
        self, outputs: list[Fact], handed_on: Sequence[bool], predicate: Fact
    ) -> list[Fact]:
        """Let the predicate choose the outputs, except those that every branch passes unchanged."""
        pairs = zip(outputs, handed_on, strict=True)
        return [fact if same else self.choose_by(fact, predicate) for fact, same in pairs]

    def run_loop(
        self, step: Callable[[list[Fact]], list[Fact]], carry: list[Fact], trips: int | None
    ) -> list[Fact]:
        """Repeat a loop's body, whose first outputs are its carry, until the carry settles.

        Args:
          step: takes the facts of the carry, returns those of the body's outputs.
          carry: the facts of the carry before the first trip.
          trips: how often the loop runs; None of a while loop.

        Returns:
          The facts of the carry after the loop, then those of what it stacks up.
        """
        while True:
            outputs = step(carry)
            after = [self.enter_loop(fact) for fact in outputs[: len(carry)]]
            settled = [self.join_facts(a, b) for a, b in zip(carry, after, strict=True)]
            if settled == carry:
                return [*carry, *outputs[len(carry) :]]
            carry = settled

    def _join_all(self, facts: Sequence[Fact]) -> Fact:
        first, *others = facts
        for fact in others:
            first = self.join_facts(first, fact)
        return first


def find_shard_maps(jaxpr: Jaxpr, frame: Frame = Frame()) -> Iterator[tuple[Eqn, Frame]]:
    """Yield each shard_map of a program, with the frame of what it holds."""
    for eqn in open_jaxpr(jaxpr).eqns:
        if eqn.primitive.name in PLAIN:
            continue
        inside = frame.enter_equation(eqn)
        if eqn.primitive.name == "shard_map":
            yield eqn, inside
        for inner in sub_jaxprs(eqn):
            yield from find_shard_maps(inner, inside)


def _chosen_alike(branches: Sequence[Jaxpr]) -> list[bool]:
    """Tell of each output of a cond whether all branches return the same operand or constant."""

    def choice_of(branch: Jaxpr, var: Var) -> object:
        if is_literal(var):
            return str(var.val)
        return branch.invars.index(var) if var in branch.invars else object()

    choices = [[choice_of(branch, var) for var in branch.outvars] for branch in branches]
    return [len(set(of_output)) == 1 for of_output in zip(*choices, strict=True)]


def _carried_along(body: Jaxpr, constants: int) -> list[bool]:
    carries = body.invars[constants:]
    return [before is after for before, after in zip(carries, body.outvars, strict=True)]
