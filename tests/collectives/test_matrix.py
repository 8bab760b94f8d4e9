"""Every collective in every dtype, mesh and transformation, check_vma on and off.

A sample in which every two choices meet; with TXCORE_ALL_COLLECTIVES=1 the whole product. One cell
is one program with all transformations in it, since compiling takes longer than running.
"""

import itertools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_ALGORITHMS, CASES
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matrix import DTYPES, GRIDS, Arrays, Cell, Truth, make_inputs
from ways import WAYS

from txcore.parallel.gradients.algorithms import pieces

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(")


def run(cell: Cell, ways: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Run a cell's program; return [world, ...] of each way, and the collectives without a tag."""
    grid, mesh = cell.grid, cell.grid.mesh

    def on_devices(f: Any) -> Any:
        def run_shard(*args: Any) -> Any:
            y = f(*jax.tree.map(lambda x: x[0], args))
            return jax.tree.map(lambda leaf: leaf[None], y)

        specs = P(grid.names)
        return jax.shard_map(
            run_shard, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=cell.check_vma
        )

    def program(given: Arrays) -> Arrays:
        chosen = {name: WAYS[name] for name in ways}
        inner = {name: way for name, way in chosen.items() if not way.around}
        results = on_devices(
            lambda given: {name: way.apply(cell, cell.op, given) for name, way in inner.items()}
        )(given)
        whole = on_devices(cell.op)
        outer = {name: way for name, way in chosen.items() if way.around}
        return results | {name: way.apply(cell, whole, given) for name, way in outer.items()}

    with jax.enable_x64(cell.dtype == "float64"):
        placed = jax.device_put(make_inputs(cell), NamedSharding(mesh, P(grid.names)))
        compiled = jax.jit(program).lower(placed).compile()
        return jax.tree.map(np.asarray, compiled(placed)), find_untagged(compiled.as_text())


def find_untagged(hlo: str) -> list[str]:
    """Return the collectives of a compiled program that carry no tag."""
    lines = [line for line in hlo.splitlines() if COLLECTIVE.search(line)]
    return [line.strip() for line in lines if "txcore[" not in line]


def check(cell: Cell, ways: list[str]) -> list[str]:
    """Return what differs from NumPy in a cell, a line for each way."""
    results, untagged = run(cell, ways)
    truth, wrong = Truth(cell), []
    # An invariant result that meets varying data is cast by jax itself: a sum of its transpose.
    if not (cell.invariant and any(WAYS[name].kind != "value" for name in ways)):
        wrong += [f"{cell}: no tag: {line}" for line in untagged]
    for name, got in results.items():
        wanted = WAYS[name].expect(truth)
        dtype = cell.result_dtype if WAYS[name].kind == "value" else jnp.dtype(cell.dtype)
        try:
            assert (got.shape, got.dtype) == (wanted.shape, dtype)
            compare(cell, got, wanted, truth)
        except AssertionError as error:
            wrong.append(f"{cell}: {name}: {' '.join(str(error).split())[:300]}")
    return wrong


def compare(cell: Cell, got: np.ndarray, wanted: np.ndarray, truth: Truth) -> None:
    if got.dtype.kind in "iub":
        np.testing.assert_array_equal(got, wanted.astype(got.dtype))
        return
    sent = jnp.bfloat16 if cell.case.algorithm == "bf16_wire" else got.dtype
    eps = max(float(jnp.finfo(dtype).eps) for dtype in (sent, got.dtype))
    # A mean of integers is one of floats: each of them is rounded.
    most = 0 if cell.floating else float(np.abs(truth.given["rows"]).max())
    atol = 2 * eps * most + 1e-12  # for the Jacobian's own rounding, of sums that are 0
    np.testing.assert_allclose(np.float64(got), wanted, rtol=2 * eps, atol=atol)


def all_cells() -> list[Cell]:
    """Return every cell of the product."""
    cells = itertools.product([*CASES, *BY_ALGORITHMS], DTYPES, GRIDS, (True, False))
    return [Cell(*choices) for choices in cells if choices[0].fits(choices[1], choices[2].group)]


def all_ways(cell: Cell) -> list[str]:
    """Return the ways that fit a cell."""
    return [name for name, way in WAYS.items() if way.fits(cell)]


THIRDS = 3


def sample() -> list[tuple[Cell, list[str]]]:
    """Return some cells of each collective, with a third of its ways in each.

    Dtype, mesh, check_vma and ways are dealt out so that every two choices of any two kinds meet.
    """
    chosen = []
    for i, case in enumerate([*CASES, *BY_ALGORITHMS]):
        dtypes = [dtype for dtype in DTYPES if case.fits(dtype, 2)]
        grids = [grid for grid in GRIDS if case.fits("float32", grid.group)]
        for j in range(max(len(dtypes), len(grids))):
            dtype, grid = dtypes[j % len(dtypes)], grids[(i + j) % len(grids)]
            cell = Cell(case, dtype, grid, (i // 2 + j) % 2 == 0)
            ways = [name for k, name in enumerate(all_ways(cell)) if (i + 2 * j + k) % THIRDS == 0]
            chosen.append((cell, ways))
    return chosen


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Let the algorithms that go piece by piece have several pieces."""
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 16)


ALL = os.environ.get("TXCORE_ALL_COLLECTIVES") == "1"
SAMPLE = sample()


@pytest.mark.parametrize("cell, ways", SAMPLE, ids=[str(cell) for cell, _ in SAMPLE])
def test_sample(cell, ways):
    assert not check(cell, ways)


@pytest.mark.skipif(not ALL, reason="TXCORE_ALL_COLLECTIVES=1 runs the whole product")
@pytest.mark.parametrize("cell", all_cells() if ALL else [None], ids=str)
def test_whole_product(cell):
    assert not check(cell, all_ways(cell))


def test_every_two_choices_meet_in_the_sample():
    def pairs_of(cells):
        met = set()
        for cell, ways in cells:
            for way in ways:
                choices = (cell.case, cell.dtype, cell.grid, cell.check_vma, way)
                met |= set(itertools.combinations(enumerate(choices), 2))
        return met

    possible = pairs_of((cell, all_ways(cell)) for cell in all_cells())
    met = pairs_of(SAMPLE)
    assert possible == met
