"""The search finds what an exhaustive one finds, with a third of its programs."""

import itertools
import random

import pytest

from txcore.profiling.cost.search import (
    Choice,
    Outcome,
    RefusedError,
    every_choice,
    list_meshes,
    search_programs,
)

MESHES = list_meshes(64, ("data", "model"))
ROWS = (64, 128, 256, 512, 1024, 2048)
REMATS = ("none", "dots", "full")
MEMORY = 80 * 10**9


class Machine:
    """A made-up program: work for each row, sums of gradients, activations that fill memory."""

    def __init__(self, seed):
        draw = random.Random(seed)
        self.row = draw.uniform(1e-4, 1e-2)
        self.sums = draw.uniform(1e-3, 1.0)
        self.exchange = draw.uniform(0, 2e-4)
        self.weights = draw.uniform(1, 60) * 1e9
        self.activations = draw.uniform(0.02, 0.6) * 1e9
        self.slower = {"none": 1.0, "dots": draw.uniform(1.02, 1.2), "full": draw.uniform(1.2, 1.4)}
        self.kept = {"none": 1.0, "dots": draw.uniform(0.3, 0.7), "full": draw.uniform(0.02, 0.3)}
        self.least = draw.choice([1, 1, 2, 4])  # the smallest model axis that the author allows
        self.compiled = 0

    def measure(self, choice):
        sizes = dict(choice.mesh)
        if choice.rows % sizes["data"] or sizes["model"] > 16 or sizes["model"] < self.least:
            raise RefusedError(f"{choice} does not divide")
        self.compiled += 1
        rows = choice.rows / 64
        work = rows * self.row * self.slower[choice.remat]
        waiting = self.sums / sizes["model"] + rows * self.exchange * (sizes["model"] - 1)
        held = choice.rows / sizes["data"] * self.activations / sizes["model"]
        peak = self.weights / sizes["model"] + held * self.kept[choice.remat]
        return Outcome(choice, work + waiting, int(peak), MEMORY, "proved")


@pytest.mark.parametrize("seed", range(40))
def test_the_optimum_in_a_third_of_the_programs(seed):
    machine, whole = Machine(seed), Machine(seed)
    found = search_programs(MESHES, ROWS, REMATS, machine.measure)
    every = []
    for choice in every_choice(MESHES, ROWS, REMATS):
        try:
            every.append(whole.measure(choice))
        except RefusedError:
            continue
    fitting = [o for o in every if o.fits]
    best = min(fitting, key=lambda o: o.cost, default=None)
    assert (found.best and found.best.choice) == (best and best.choice)
    assert found.compiled == machine.compiled
    assert found.possible <= len(every)
    assert found.compiled <= len(every) / 3


def test_all_ways_to_part_the_devices():
    assert [dict(m) for m in list_meshes(12, ("a",))] == [{"a": 12}]
    pairs = [tuple(dict(m).values()) for m in list_meshes(12, ("a", "b"))]
    assert pairs == [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]
    assert len(list_meshes(64, ("a", "b", "c"))) == 28, "64 is 2 to the 6th: (6 + 2) over 2"


def test_without_batches_every_mesh_is_tried_once():
    tried = []

    def measure(choice):
        tried.append(choice)
        return Outcome(choice, dict(choice.mesh)["model"] ** -0.5, 1, 2, "proved")

    found = search_programs(MESHES, (), (), measure)
    assert found.best.choice == Choice((("data", 1), ("model", 64)))
    assert len(tried) == len(set(tried)) == found.compiled == found.possible == len(MESHES)
    assert str(found.best.choice) == "data=1,model=64"


def test_what_was_found_when_the_time_was_up():
    times = itertools.count()
    found = search_programs(
        MESHES, ROWS, REMATS, Machine(1).measure, seconds=3, clock=lambda: next(times)
    )
    assert found.stopped
    assert 1 <= found.compiled <= 4
    assert not search_programs(MESHES, ROWS, REMATS, Machine(1).measure).stopped


def test_nothing_fits():
    found = search_programs(
        MESHES, ROWS, REMATS, lambda choice: Outcome(choice, 1.0, 3, 2, "proved")
    )
    assert found.best is None
    assert found.largest is None


def test_a_compiler_that_gives_up_is_a_program_that_does_not_fit():
    def measure(choice):
        peak = None if choice.rows > 128 else 1
        return Outcome(choice, float("inf") if peak is None else 1.0, peak, 2, "proved")

    found = search_programs(MESHES[:2], ROWS, REMATS, measure)
    assert found.best.choice.rows == 128
    assert found.largest.choice.rows == 128


@pytest.mark.parametrize("most", [0, 64, 256])  # from the first batch on, the second, a later one
def test_a_policy_fits_where_the_compiler_gives_up_without_one(most):
    def measure(choice):
        peak = None if choice.remat == "none" and choice.rows > most else 1
        return Outcome(choice, float("inf") if peak is None else 1.0, peak, 2, "proved")

    found = search_programs(MESHES[:2], ROWS, REMATS, measure)
    assert found.best.choice == Choice(found.best.choice.mesh, ROWS[-1], "dots")


def test_a_refused_batch_says_nothing_of_larger_ones():
    def measure(choice):
        if choice.rows == 256:
            raise RefusedError("not that one")
        return Outcome(choice, 1.0, choice.rows, 1000, "proved")

    found = search_programs(MESHES[:1], ROWS, (), measure)
    assert found.largest.choice.rows == 512
    assert found.possible == len(ROWS) - 1


def test_what_one_policy_refuses_others_allow():
    def measure(choice):
        if choice.remat == "dots":
            raise RefusedError("no dots")
        peak = choice.rows if choice.remat == "none" else 1
        return Outcome(choice, 1.0, peak, 128, "proved")

    found = search_programs(MESHES[:1], ROWS, REMATS, measure)
    assert found.best.choice == Choice(MESHES[0], ROWS[-1], "full")
    assert found.compiled <= found.possible == len(ROWS) * len(REMATS) - len(found.refused)
