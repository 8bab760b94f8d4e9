"""Search the programs of a GPT for a target, and compile all of them: the same optimum?

    python benchmarks/cost_search.py [--target cuda:h100:8x8] [--batch 64,128,256,512]

Needs the extra gpu-target. Nothing is run; each program takes seconds to compile.
"""

import argparse
import os
import pathlib
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "tests/profiling/targets"))

import gpt_step

from txcore.cli.search import measure_choice, write_table
from txcore.profiling.cost.search import (
    RefusedError,
    every_choice,
    list_meshes,
    search_programs,
)
from txcore.profiling.targets import parse_target


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="cuda:h100:8x8")
    parser.add_argument("--batch", default="64,128,256,512")
    parser.add_argument("--remat", default="none,dots,full")
    parser.add_argument("--small", action="store_true", help="the model of the tests")
    args = parser.parse_args()
    target = parse_target(args.target)
    factory = gpt_step.build if args.small else gpt_step.build_large
    known = {}

    def measure(choice):
        if choice not in known:
            known[choice] = measure_choice(factory, "gpt_step", target, choice)
        return known[choice]

    grid = list_meshes(target.size, ("data", "model")), [int(b) for b in args.batch.split(",")]
    remats = args.remat.split(",")
    started = time.perf_counter()
    found = search_programs(*grid, remats, measure)
    print("\n".join(write_table(found, target)))
    print(f"searched in {time.perf_counter() - started:.0f} s", flush=True)
    for choice in every_choice(*grid, remats):
        try:
            measure(choice)
        except RefusedError:
            continue
    best = min((o for o in known.values() if o.fits), key=lambda o: o.cost)
    same = found.best is not None and found.best.choice == best.choice
    print(
        f"exhaustive: {best.choice} of {len(known)} programs, {time.perf_counter() - started:.0f} s"
    )
    print(f"the same: {same}, with {found.compiled / len(known):.0%} of the compilations")


if __name__ == "__main__":
    main()
