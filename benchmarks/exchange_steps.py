"""Steps that differ in how gradients are exchanged alone, and their times side by side.

    python benchmarks/exchange_steps.py                     # 2 devices of this process
    python benchmarks/exchange_steps.py HOST:PORT RANK      # one of 2 gloo processes

Prints a line for each model and exchange: the median milliseconds of alternating rounds.
"""

import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore import _compat
from txcore.kernels import pack, unpack

DEVICES = 2
MODELS = {
    "200 leaves of 16 KiB": {f"p{i:03}": (64, 64) for i in range(200)},
    "3 leaves of 50 MB": {f"p{i}": (2500, 5000) for i in range(3)},
}
# What `sync_gradients` is given.
EXCHANGES = {
    "per leaf": {"buckets": 1e-6, "algorithm": "plain"},
    "XLA-combined": {"algorithm": "plain"},
    "bucketed": {"buckets": 25, "algorithm": "plain"},
    "bucketed, fastest": {"buckets": 25},
    "default": {},
}
FLAT = {"flat view": {"algorithm": "plain"}, "flat view, fastest": {}}
KINDS = [*EXCHANGES, *FLAT]


def make_step(model, kind, mesh):
    """Return a compiled step, its parameters in place, and the scales of both devices.

    The loss is half of the sum of squares, times a scale: each gradient is read and written once.
    """
    shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in model.items()}

    def loss_of(params, scale):
        own = unpack(params, shapes) if kind in FLAT else params
        return 0.5 * scale[0] * sum((p * p).sum() for p in own.values())

    def step(params, scale):
        grads = jax.grad(loss_of)(tx.vary(params, "data"), scale)
        options = FLAT.get(kind) or EXCHANGES.get(kind, {})
        grads, _ = tx.sync_gradients(grads, "data", **options)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    params: Any = {name: np.ones(shape, np.float32) for name, shape in model.items()}
    if kind in FLAT:
        params = np.asarray(pack(params))
    place = mesh.sharding()
    params = jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, place, x.__getitem__), params
    )
    rows = np.array([1.0, 3.0], np.float32)
    scale = jax.make_array_from_callback((DEVICES,), mesh.sharding("data"), rows.__getitem__)
    mapped = jax.shard_map(step, mesh=mesh.mesh, in_specs=(P(), P("data")), out_specs=P())
    compiled = jax.jit(mapped, donate_argnums=0).lower(params, scale).compile()
    return compiled, params, scale


def time_steps(model, mesh, rounds):
    """Return the median milliseconds of each kind of exchange, in alternating rounds."""
    runs = {kind: make_step(model, kind, mesh) for kind in KINDS}
    params = {kind: run[1] for kind, run in runs.items()}
    times = {kind: [] for kind in KINDS}
    for _ in range(rounds + 2):
        for kind, (step, _, scale) in runs.items():
            began = time.perf_counter()
            params[kind] = jax.block_until_ready(step(params[kind], scale))
            times[kind].append(1e3 * (time.perf_counter() - began))
    return {kind: statistics.median(taken[2:]) for kind, taken in times.items()}


def main(arguments):
    """Print the times, of this process's devices or of one of two processes."""
    jax.config.update("jax_platforms", "cpu")
    if arguments:
        coordinator, rank = arguments
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, DEVICES, int(rank))
    else:
        _compat.simulate_cpu_devices(DEVICES)
    mesh = tx.MeshSpec(jax.devices()[:DEVICES])
    for name, model in MODELS.items():
        rounds = 9 if len(model) < 10 else 21
        for kind, taken in time_steps(model, mesh, rounds).items():
            print(f"{name:22} {kind:20} {taken:9.2f} ms", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
