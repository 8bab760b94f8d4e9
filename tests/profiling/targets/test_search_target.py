"""`txcore costs --search` of a GPT's step for machines that are not here."""

import importlib.util
import json
import pathlib

import gpt_step
import pytest

from txcore import cli
from txcore.cli.search import measure_choice
from txcore.profiling.cost.search import (
    RefusedError,
    every_choice,
    list_meshes,
    search_programs,
)
from txcore.profiling.targets import parse_target

FACTORY = f"{pathlib.Path(gpt_step.__file__)}:build"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the CUDA compiler"
)


def test_the_command_shows_the_cheapest_and_the_largest(capsys):
    options = ["--search", "data,model", "--batch", "2,4", "--target", "cuda:h100:2"]
    options += ["--seconds", "1e6"]  # however busy the machine is
    assert cli.main(["costs", FACTORY, *options, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["possible"] == 4
    assert found["best"]["status"] == "proved"
    assert found["largest"]["batch"] == 4
    assert {tuple(p["mesh"].values()) for p in found["programs"]} == {(2, 1), (1, 2)}
    costs = [p["seconds"] / p["batch"] for p in found["programs"] if p["fits"]]
    assert found["best"]["seconds"] / found["best"]["batch"] == min(costs)
    assert err.count("compiling ") == found["compiled"]


@pytest.mark.extra
def test_the_same_optimum_as_of_all_programs():
    target, known = parse_target("cuda:h100:8"), {}

    def measure(choice):
        if choice not in known:
            known[choice] = measure_choice(gpt_step.build, "gpt_step", target, choice)
        return known[choice]

    grid = list_meshes(8, ("data", "model")), (8, 16, 32, 64), ("none", "dots", "full")
    found = search_programs(*grid, measure)
    for choice in every_choice(*grid):
        try:
            measure(choice)
        except RefusedError:
            continue
    best = min((o for o in known.values() if o.fits), key=lambda o: o.cost)
    assert found.best.choice == best.choice
    assert found.compiled <= len(known) / 3
