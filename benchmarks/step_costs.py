"""Host time of a step: `engine.run` and `fit` beside a plain `jax.jit` step of the same arrays.

    taskset -c 1 python benchmarks/step_costs.py

The steps compute the same, and next to nothing, so that what is timed is what the host does. All
forms live in one process and run in turns; the batches lie on the mesh already, and each is another
one. The plain step donates its state too, and nobody reads its loss; `fit` has two loggers, of
which one reads every loss. Timed is the process' CPU time, which other processes do not change.
"""

import argparse
import io
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from tabulate import tabulate

import txcore as tx
from txcore import launch
from txcore.launch import watch

BATCHES = 8


@tx.step_fn
def train_step(state, batch):
    """Descend by the mean of a few products."""

    def loss_of(params):
        return sum(jnp.mean(batch["x"] * leaf) for leaf in params)

    loss, grads = tx.value_and_grad(loss_of)(state.params)
    grads = tx.pmean(grads, "data")
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}


def make_plain_step(engine):
    """Return the engine's compiled step as one writes it without an engine: one jitted function."""
    (compiled,) = engine._steps._compiled.values()
    program = compiled.program
    closed, out_tree = program.jaxpr, program.lowered.out_tree

    def step(arrays, batch):
        leaves = jax.tree.leaves((arrays, batch))
        return jax.tree.unflatten(out_tree, jaxpr_as_fun(closed)(*leaves))

    return jax.jit(step, donate_argnums=0, compiler_options=engine.compiler_options)


def prepare(leaves, devices):
    """Return functions of a number of steps: those of plain jax, of the engine, and of fit."""
    mesh = tx.MeshSpec(jax.devices()[:devices])
    seen = []
    engine = tx.Engine(
        mesh=mesh,
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.sgd(0.1, momentum=0.9),
        loggers=[
            tx.loggers.Basic(every=10**9, stream=io.StringIO()),
            lambda record: seen.append(record.metrics.get("loss")),
        ],
    )
    params = [np.full(8, 0.5, np.float32) for _ in range((leaves - 2) // 2)]
    hosts = [{"x": np.full(8, i, np.float32)} for i in range(BATCHES)]
    batches = jax.device_put(hosts, mesh.sharding("data"))
    state, fit_state = engine.create_state(params), engine.create_state(params)
    assert len(jax.tree.leaves(state)) == leaves
    state, _ = engine.run(train_step, state, batches[0])
    plain_state, plain_step = engine.create_state(params).arrays, make_plain_step(engine)

    def run_plain(steps):
        nonlocal plain_state
        for i in range(steps):
            plain_state, metrics = plain_step(plain_state, batches[i % BATCHES])
        jax.block_until_ready(metrics)

    def run_engine(steps):
        nonlocal state
        for i in range(steps):
            state, metrics = engine.run(train_step, state, batches[i % BATCHES])
        jax.block_until_ready(metrics)

    def call_step(steps):
        nonlocal state
        for i in range(steps):
            state, metrics = train_step(state, batches[i % BATCHES])
        jax.block_until_ready(metrics)

    made = 0

    def run_fit(steps):
        nonlocal fit_state, made
        made += steps
        seen.clear()
        data = [batches[i % BATCHES] for i in range(steps)]
        fit_state = engine.fit(train_step, fit_state, data, steps=made)
        assert len(seen) == steps + 1  # and the end

    return {
        "plain jax.jit": run_plain,
        "engine.run": run_engine,
        "step(state, batch)": call_step,
        "fit, two loggers": run_fit,
    }


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=400, help="in each round")
    parser.add_argument("--leaves", type=int, nargs="*", default=[10, 40, 300])
    args = parser.parse_args()
    launch.simulate_cpu_devices(args.devices)
    watch.start()
    rows = []
    for leaves in args.leaves:
        forms = prepare(leaves, args.devices)
        times = {name: [] for name in forms}
        for run in forms.values():
            run(20)
        for _ in range(args.rounds):
            for name, run in forms.items():
                started = time.process_time()
                run(args.steps)
                times[name].append(1e6 * (time.process_time() - started) / args.steps)
        plain = times["plain jax.jit"]
        for name, own in times.items():
            ratio = statistics.median(o / p for o, p in zip(own, plain, strict=True))
            rows.append((leaves, name, f"{statistics.median(own):.1f}", f"{ratio:.2f}"))
    print(f"{args.devices} device(s), jax {jax.__version__}, {args.rounds} rounds of {args.steps}")
    print(tabulate(rows, ("leaves", "form", "us a step", "x plain"), tablefmt="github"))


if __name__ == "__main__":
    main()
