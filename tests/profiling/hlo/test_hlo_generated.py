"""Random programs, compiled by the installed jax, read back as they were generated.

A program is a chain: each collective works on a value that depends on the one before, so that
XLA can neither combine, hoist nor drop any. Loops nest around parts of the chain.
"""

import math
import random
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_cases import P, mesh_of, on, shape, tag, vary
from jax import lax

from txcore.profiling.hlo import find_collectives

SIZES = {"x": 2, "y": 2, "z": 2}
IDS = np.arange(8).reshape(2, 2, 2)
KINDS = {
    "psum": "all-reduce",
    "pmax": "all-reduce",
    "gather": "all-gather",
    "scatter": "reduce-scatter",
    "swap": "all-to-all",
    "shift": "collective-permute",
}
# XLA for CPU sends bfloat16 as float32.
DTYPES = {"float32": (4,), "float16": (2,), "int32": (4,), "bfloat16": (2, 4)}
PROGRAMS = 14


@dataclass(frozen=True)
class Step:
    """One collective: `primitive` of an array of `dims` over `axes`."""

    name: str
    primitive: str
    axes: tuple[str, ...]
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """Steps and loops that run `length` times."""

    length: int
    body: tuple["Step | Loop", ...]


def steps(rng, names, depth):
    for _ in range(rng.randint(1, 3)):
        if depth < 2 and rng.random() < 0.4:
            yield Loop(rng.randint(2, 5), tuple(steps(rng, names, depth + 1)))
            continue
        primitive = rng.choice(list(KINDS))
        most = 1 if primitive in ("swap", "shift") else 3
        axes = tuple(sorted(rng.sample(list(SIZES), rng.randint(1, most))))
        dims = (8 * rng.randint(1, 3), *(rng.randint(1, 5) for _ in range(rng.randint(0, 2))))
        yield Step(f"op{next(names)}", primitive, axes, rng.choice(list(DTYPES)), dims)


def traced(step, state):
    x = (jnp.sin(state) * jnp.arange(math.prod(step.dims))).reshape(step.dims).astype(step.dtype)
    with tag(step.name):
        match step.primitive:
            case "psum":
                return lax.psum(x, step.axes)
            case "pmax":
                return lax.pmax(x, step.axes)
            case "gather":
                return lax.all_gather(x, step.axes, tiled=True)
            case "scatter":
                return lax.psum_scatter(x, step.axes, tiled=True)
            case "swap":
                return lax.all_to_all(x, step.axes, 0, 0, tiled=True)
            case _:
                return lax.ppermute(x, step.axes, [(0, 1), (1, 0)])


def run(program, state):
    for part in program:
        if isinstance(part, Loop):

            def turn(state, _, body=part.body):
                return run(body, state), None

            state, _ = lax.scan(turn, state, None, part.length)
        else:
            result = traced(part, state).astype(jnp.float32)
            state = vary(jnp.tanh(result).sum() + state, *SIZES)
    return state


def expected(program, trips=1):
    """Count by hand: name -> (kind, groups or pairs, S for each width on the wire, trips)."""
    found = {}
    for part in program:
        if isinstance(part, Loop):
            found |= expected(part.body, trips * part.length)
            continue
        rest = [i for i, axis in enumerate(SIZES) if axis not in part.axes]
        along = [i for i, axis in enumerate(SIZES) if axis in part.axes]
        groups = IDS.transpose(rest + along).reshape(-1, 2 ** len(along)).tolist()
        among = tuple(sorted(tuple(sorted(group)) for group in groups))
        if part.primitive == "shift":
            among = tuple(sorted(pair for a, b in among for pair in ((a, b), (b, a))))
        n = 2 ** len(along) if part.primitive == "gather" else 1
        sizes = {n * math.prod(part.dims) * width for width in DTYPES[part.dtype]}
        found[part.name] = (KINDS[part.primitive], among, sizes, trips)
    return found


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_a_random_program_reads_as_it_was_generated(seed):
    rng = random.Random(seed)
    program = tuple(steps(rng, iter(range(100)), 0))
    mesh = mesh_of(**SIZES)
    spec = P(tuple(SIZES))
    fn = on(mesh, spec, spec)(lambda state: run(program, state[0])[None])
    text = jax.jit(fn).lower(shape(mesh, spec, 8)).compile().as_text()

    wanted = expected(program)
    ops = find_collectives(text)

    assert sorted(op.tags for op in ops) == sorted((name,) for name in wanted)
    for op in ops:
        kind, among, sizes, trips = wanted[op.tags[0]]
        assert (op.kind, op.pairs or tuple(op.groups)) == (kind, among)
        assert op.bytes in sizes
        assert (op.trips.count, op.trips.known) == (trips, True)
        assert {array.tag for array in op.inputs} == {op.tags[0]}


def test_the_programs_have_every_kind_dtype_and_depth():
    programs = [tuple(steps(random.Random(s), iter(range(100)), 0)) for s in range(PROGRAMS)]
    wanted = [row for program in programs for row in expected(program).values()]
    assert {row[0] for row in wanted} == set(KINDS.values())
    assert {len(row[1][0]) for row in wanted} == {2, 4, 8}
    assert max(row[3] for row in wanted) > 10
