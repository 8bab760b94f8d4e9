"""What a step takes to compile, checks and audit included, beside plain jax's same model.

    taskset -c 0,1 python benchmarks/compile_costs.py [--target cuda:h100:1]

In turns, in one process, each time from nothing: jax's caches are cleared before. Plain jax's step
is the model as anyone writes it, its layers one after the other as txcore's are, with the same
optimizer, on one device. An engine's step is traced, checked, lowered, compiled and audited, as at
the beginning of a run that proves itself. With a target both are compiled for that machine. Counted
are the process' CPU seconds, which other processes change least.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compilers' plugins would look for devices
os.environ.pop("TXCORE_CACHE", None)  # an engine would take its programs from there
sys.path.append(str(pathlib.Path(__file__).resolve().parent / "peers"))
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "examples" / "mnist"))

import gpt_plain
import jax
import jax_worker
import mnist_step
import models
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tabulate import tabulate

from txcore.profiling.targets import parse_target

STAGES = ("lower", "compile")  # jax's own, like the trace in the rest
FORMS = ("txcore", "plain jax")


def watch_stages(seconds):
    """Count the seconds of jax's own stages in `seconds`."""

    def watch(name, owner):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.process_time() - started

        setattr(owner, name, timed)

    watch("lower", jax.stages.Traced)
    watch("compile", jax.stages.Lowered)


def prepare(model, form, args):
    """Return a function that compiles one form of a model's step."""
    if model == "mnist" and form == "txcore":
        made = mnist_step.prepare_step("cnn3x3", 1)
    elif model == "mnist":
        layers = models.init(models.layers_of("cnn3x3", dropout=0), seed=0)
        params = {f"{a}/{b}": leaf for a, layer in layers.items() for b, leaf in layer.items()}
        batch = mnist_step.random_batch(1)
        arrays = params, params, batch["image"], batch["label"]
        made = jax_worker.train_step, arrays, (P(), P(), P("data"), P("data"))
    else:
        own = gpt_plain.prepare_engine if form == "txcore" else gpt_plain.prepare_plain
        made = own(args.layers)
    compile_one = audit if form == "txcore" else compile_plain
    return lambda: compile_one(args.target, *made)


def audit(target, engine, step, state, batch):
    """Compile a step of an engine and account for its collectives."""
    if target is None:
        return engine.audit(step, state, batch)
    return engine.audit(step, state, batch, target=target, mesh=dict(engine.mesh.shape))


def compile_plain(target, step, arrays, specs):
    """Compile plain jax's step."""
    if target is None:
        mesh, options = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)), {}
    else:
        machine = parse_target(target)
        mesh, options = machine.mesh({"data": 1}), machine.compiler_options

    def shapes_of(tree, spec):
        place = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    shapes = map(shapes_of, arrays, specs)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return jax.jit(mapped, donate_argnums=(0, 1)).trace(*shapes).lower().compile(options)


def measure(model, form, args, seconds):
    """Return the seconds of a compilation by stage; what precedes it is not counted."""
    compile_one = prepare(model, form, args)
    jax.clear_caches()
    seconds.update(dict.fromkeys(STAGES, 0.0))
    started = time.process_time()
    compile_one()
    whole = time.process_time() - started
    return {**seconds, "trace, checks, audit": whole - sum(seconds.values()), "all": whole}


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="a machine that need not be here: cuda:h100:1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4, help="of the GPT")
    parser.add_argument("--models", nargs="*", default=["mnist", "gpt"])
    args = parser.parse_args()
    seconds = {}
    watch_stages(seconds)
    rows, heads = [], (*STAGES, "trace, checks, audit", "all")
    for model in args.models:
        found = {form: [] for form in FORMS}
        for i in range(args.rounds + 1):
            for form in FORMS:
                one = measure(model, form, args, seconds)
                told = ", ".join(f"{name} {s:.2f}" for name, s in one.items())
                print(f"  {model}, {form}: {told}", flush=True)
                if i:  # the first imports what it needs
                    found[form].append(one)
        plain = found["plain jax"]
        for form, own in found.items():
            ratio = statistics.median(o["all"] / p["all"] for o, p in zip(own, plain, strict=True))
            medians = (f"{statistics.median(one[h] for one in own):.2f}" for h in heads)
            rows.append((model, form, *medians, f"{ratio:.2f}"))
    print(f"{args.target or 'cpu:1'}, jax {jax.__version__}, {args.rounds} rounds, CPU seconds")
    print(tabulate(rows, ("model", "form", *heads, "x plain"), tablefmt="github"))


if __name__ == "__main__":
    main()
