"""Trace a stage's forward and backward pass as one program, and cut it into passes.

What a later pass uses of an earlier one is found in the traced program: it is what has to be kept
from one tick to another. What follows from parameters and microbatch alone is computed again,
since both are at hand. `jax.checkpoint` around a block makes that its input alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

# Programs that are called by name; to cut a pass in two they are written out.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")

Env = dict[Any, Any]  # the value of each variable


@dataclass(frozen=True)
class Pass:
    """One part of a traced program.

    Attributes:
      program: a Jaxpr whose inputs are `reads` and whose outputs are `writes`.
      reads: the variables that it uses.
      writes: the variables that it makes, for the caller or for a later pass.
    """

    program: Any
    reads: tuple[Any, ...]
    writes: tuple[Any, ...]

    def run(self, env: Env) -> None:
        """Compute the pass; adds what it writes to `env`."""
        from jax.extend.core import ClosedJaxpr, jaxpr_as_fun  # imports all of Pallas

        values = jaxpr_as_fun(ClosedJaxpr(self.program, []))(*(env[v] for v in self.reads))
        env.update(zip(self.writes, values, strict=True))


@dataclass(frozen=True)
class StageProgram:
    """A stage's passes, and what goes from one to another.

    Attributes:
      inputs: the variables of each input, by name, and their tree.
      consts: the values of variables that the traced function closes over.
      passes: by letter: "F" and "B", and "W" where the backward pass is split.
      outputs: the variables (or constants) of each output, by name, and their tree.
      early: which leaves of the parameters' gradient pass "B" makes; "W" makes the others.
      stash: what "F" leaves for the others.
      held: what "B" leaves for "W".
    """

    inputs: dict[str, tuple[Any, list[Any]]]
    consts: Env
    passes: dict[str, Pass]
    outputs: dict[str, tuple[Any, list[Any]]]
    early: tuple[bool, ...]
    stash: tuple[Any, ...]
    held: tuple[Any, ...]

    def bind(self, **inputs: Any) -> Env:
        """Return the values of the variables of the inputs that are given."""
        env = dict(self.consts)
        for name, tree in inputs.items():
            env.update(zip(self.inputs[name][1], jax.tree.leaves(tree), strict=True))
        return env

    def read(self, env: Env, name: str) -> Any:
        """Return an output."""
        treedef, atoms = self.outputs[name]
        return treedef.unflatten([_value_of(env, atom) for atom in atoms])

    def read_gradient(self, env: Env, late: bool) -> list[Any]:
        """Return the leaves of the parameters' gradient that "B" makes, or "W"; None for others."""
        atoms = self.outputs["grads"][1]
        chosen = [is_early is not late for is_early in self.early]
        return [
            _value_of(env, atom) if mine else None for atom, mine in zip(atoms, chosen, strict=True)
        ]


def _value_of(env: Env, atom: Any) -> Any:
    return atom.val if hasattr(atom, "val") else env[atom]


def trace_stage(
    block: Callable[..., Any], chunk: Any, x: Any, microbatch: Any, stage: Any, *, split: bool
) -> StageProgram:
    """Trace a block with its derivatives, and cut it into passes.

    Args:
      block: `block(chunk, x, microbatch, stage)`, which returns what has the type of `x`.
      chunk: its parameters.
      x: its input.
      microbatch: the microbatch.
      stage: the number of the virtual stage.
      split: whether the gradient of the parameters is a pass of its own.
    """

    def run_all(chunk: Any, microbatch: Any, stage: Any, x: Any, dy: Any) -> dict[str, Any]:
        y, pull = jax.vjp(lambda c, x: block(c, x, microbatch, stage), chunk, x)
        grads, dx = pull(dy)
        return {"y": y, "dx": dx, "grads": grads}

    given = {"chunk": chunk, "microbatch": microbatch, "stage": stage, "x": x, "dy": x}
    closed, shapes = jax.make_jaxpr(run_all, return_shape=True)(*given.values())
    if split:
        closed = _write_out_calls(closed, jax.tree.leaves(tuple(given.values())))
    jaxpr = closed.jaxpr
    inputs = _name_leaves(given, jaxpr.invars)
    outputs = _name_leaves(dict(sorted(shapes.items())), jaxpr.outvars)
    return _cut_program(closed, inputs, outputs, split)


def _name_leaves(trees: dict[str, Any], variables: Sequence[Any]) -> dict[str, Any]:
    """Return for each tree its structure and its leaves' variables, which are given in order."""
    left, named = list(variables), {}
    for name in trees:
        leaves, treedef = jax.tree.flatten(trees[name])
        named[name] = (treedef, left[: len(leaves)])
        left = left[len(leaves) :]
    assert not left
    return named


def _cut_program(
    closed: Any, inputs: dict[str, Any], outputs: dict[str, Any], split: bool
) -> StageProgram:
    jaxpr = closed.jaxpr
    moving = _find_moving(jaxpr, {*inputs["x"][1], *inputs["dy"][1]})
    back = _find_moving(jaxpr, set(inputs["dy"][1]))
    taken: set[int] = set()
    grads = outputs["grads"][1]
    # A callback in a block runs once for each microbatch, as its forward pass does.
    callbacks = [
        e for e in jaxpr.eqns if e.effects and not back.intersection(_list_variables(e.invars))
    ]
    equations = {"F": _take_equations(jaxpr, outputs["y"][1], moving, taken, callbacks)}
    wanted = outputs["dx"][1] + ([] if split else grads)
    equations["B"] = _take_equations(jaxpr, wanted, moving, taken)
    made = {v for eqn in (*equations["F"], *equations["B"]) for v in eqn.outvars} | {*jaxpr.invars}
    # A scan of layers makes both gradients at once: then nothing is left to do for these.
    early = tuple(not split or not _is_variable(g) or g in made for g in grads)
    if split:
        late = [g for g, is_early in zip(grads, early, strict=True) if not is_early]
        equations["W"] = _take_equations(jaxpr, late, moving, taken)
    passes, after = {}, set(_list_variables([a for _, atoms in outputs.values() for a in atoms]))
    for letter in reversed(equations):
        passes[letter] = _make_pass(jaxpr, equations[letter], after)
        after |= set(passes[letter].reads)
    known = {*jaxpr.constvars}.union(*(inputs[n][1] for n in ("chunk", "microbatch", "stage")))
    earlier = {*passes["F"].writes, *inputs["x"][1]}
    used = [v for letter in ("B", "W") if letter in passes for v in passes[letter].reads]
    stash = tuple(dict.fromkeys(v for v in used if v in earlier and v not in known))
    late_reads = passes["W"].reads if split else ()
    held = tuple(v for v in late_reads if v not in known and v not in stash)
    consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    return StageProgram(inputs, consts, passes, outputs, early, stash, held)


def _is_variable(atom: Any) -> bool:
    return not hasattr(atom, "val")


def _list_variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if _is_variable(atom)]


def _find_moving(jaxpr: Any, roots: set[Any]) -> set[Any]:
    """Return the variables that follow from `roots`: what changes from microbatch to microbatch."""
    moving = set(roots)
    for eqn in jaxpr.eqns:
        if any(v in moving for v in _list_variables(eqn.invars)):
            moving |= set(eqn.outvars)
    return moving


def _take_equations(
    jaxpr: Any,
    atoms: Sequence[Any],
    moving: set[Any],
    taken: set[int],
    also: Sequence[Any] = (),
) -> list[Any]:
    """Take the equations that `atoms` or `also` need and no pass before has taken, in order.

    Those that do not move are taken by every pass that needs them: they cost less than to keep.
    """
    needed, mine = set(_list_variables(atoms)), []
    for number in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[number]
        wanted = any(v in needed for v in eqn.outvars) or any(eqn is one for one in also)
        if number in taken or not wanted:
            continue
        if any(v in moving for v in eqn.outvars):
            taken.add(number)
        mine.append(eqn)
        needed |= set(_list_variables(eqn.invars))
    return mine[::-1]


def _make_pass(jaxpr: Any, equations: list[Any], after: set[Any]) -> Pass:
    made = {v for eqn in equations for v in eqn.outvars}
    used = [v for eqn in equations for v in _list_variables(eqn.invars)]
    reads = tuple(dict.fromkeys(v for v in used if v not in made))
    writes = tuple(v for eqn in equations for v in eqn.outvars if v in after)
    program = jaxpr.replace(constvars=(), invars=list(reads), outvars=list(writes), eqns=equations)
    return Pass(program, reads, writes)


def _write_out_calls(closed: Any, args: Sequence[Any]) -> Any:
    """Return the program with the equations of the programs that it calls in place of the calls."""
    names = {eqn.primitive.name for eqn in closed.jaxpr.eqns}
    if not names & set(_CALLS):
        return closed
    return jax.make_jaxpr(lambda *args: _run_written_out(closed.jaxpr, closed.consts, args))(*args)


def _run_written_out(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    used = {v for eqn in jaxpr.eqns for v in _list_variables(eqn.invars)} | {
        *_list_variables(jaxpr.outvars)
    }
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name in _CALLS and inner is not None:
            values = [_value_of(env, atom) for atom in eqn.invars]
            body = getattr(inner, "jaxpr", inner)
            with jax.named_scope(str(eqn.source_info.name_stack) or eqn.primitive.name):
                results = _run_written_out(body, getattr(inner, "consts", ()), values)
            env.update(zip(eqn.outvars, results, strict=True))
        else:
            _make_pass(jaxpr, [eqn], used).run(env)
    return [_value_of(env, atom) for atom in jaxpr.outvars]
