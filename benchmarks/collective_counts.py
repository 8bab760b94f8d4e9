"""How many collectives are compiled: steps written with txcore beside the same ones in plain jax.

    python benchmarks/collective_counts.py [--target tpu:v5e:2x4 ...]

Compiles for machines that are not here, so it needs the extras tpu-target and gpu-target. What the
compiler combines counts once, and a loop's body once.
"""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import sys
from collections import Counter
from types import SimpleNamespace

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compilers' plugins would look for devices
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "examples" / "mnist"))

import jax
import jax.numpy as jnp
import models
import numpy as np
import train
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tabulate import tabulate

import txcore as tx
from txcore import kernels
from txcore.profiling import audit

TARGETS = ("cpu:8", "cuda:h100:8", "tpu:v5e:2x4", "tpu:v5p:2x2x2")
DEVICES = 8
RING = [(i, (i + 1) % DEVICES) for i in range(DEVICES)]


def masked_sum(x, axis, root):
    here = lax.axis_index(axis) == root
    return lax.psum(jax.tree.map(lambda v: jnp.where(here, v, jnp.zeros_like(v)), x), axis)


# The functions of jax.lax by txcore's names and options.
PLAIN = SimpleNamespace(
    psum=lambda x, axis, name=None: lax.psum(x, axis),
    pmean=lambda x, axis, name=None: lax.pmean(x, axis),
    pmax=lambda x, axis, name=None: lax.pmax(x, axis),
    pmin=lambda x, axis, name=None: lax.pmin(x, axis),
    vary=lambda x, axis, name=None: lax.pcast(x, axis, to="varying"),
    all_gather=lambda x, axis, name=None, invariant=False: lax.all_gather(
        x, axis, tiled=True, to="invarying" if invariant else "varying"
    ),
    reduce_scatter=lambda x, axis, name=None: lax.psum_scatter(x, axis, tiled=True),
    all_to_all=lambda x, axis, split_dim, concat_dim, name=None: lax.all_to_all(
        x, axis, split_dim, concat_dim, tiled=True
    ),
    ppermute=lambda x, axis, perm, name=None: lax.ppermute(x, axis, perm),
    broadcast=lambda x, axis, root, name=None: masked_sum(x, axis, root),
)


def make_shape(mesh, dims, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P(*spec)))


def prepare_mlp(lib, mesh):
    """Return a 12-layer MLP's loss and gradients, both averaged."""

    def loss_of(w, x):
        for layer in w:
            x = jnp.tanh(x @ layer)
        return jnp.mean(x**2)

    def step(w, x):
        loss, grads = jax.value_and_grad(loss_of)(lib.vary(w, "data"), x)
        return lib.pmean(grads, "data", name="grads"), lib.pmean(loss, "data", name="loss")

    fn = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    return fn, ([make_shape(mesh, (64, 64))] * 12, make_shape(mesh, (64, 64), "data"))


def prepare_block(lib, mesh):
    """Return a transformer block's step with ZeRO 1: each device updates its part of each leaf."""
    width, heads = 128, 4
    dims = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
        "scale": (2 * width,),
    }

    def loss_of(w, x):
        q, k, v = jnp.split(x @ w["qkv"], 3, axis=-1)
        cut = lambda a: a.reshape(*a.shape[:2], heads, -1)  # noqa: E731
        weights = jax.nn.softmax(jnp.einsum("bshk,bthk->bhst", cut(q), cut(k)))
        x = x + jnp.einsum("bhst,bthk->bshk", weights, cut(v)).reshape(x.shape) @ w["out"]
        x = x + jax.nn.gelu(x * w["scale"][:width] @ w["up"]) @ w["down"] * w["scale"][width:]
        return jnp.mean(x**2)

    def step(w, momentum, x):
        loss, grads = jax.value_and_grad(loss_of)(lib.vary(w, "data"), x)
        grads = lib.reduce_scatter(grads, "data", name="grads")
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g / DEVICES, momentum, grads)
        index = lax.axis_index("data")

        def update(leaf, m):
            mine = lax.dynamic_slice_in_dim(leaf, index * len(m), len(m))
            return mine - 0.1 * m

        parts = jax.tree.map(update, lib.vary(w, "data"), momentum)
        w = lib.all_gather(parts, "data", invariant=True, name="params")
        return w, momentum, lib.pmean(loss, "data", name="loss")

    specs = (P(), P("data"), P("data"))
    fn = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P(), P("data"), P()))
    w = {name: make_shape(mesh, d) for name, d in dims.items()}
    momentum = {name: make_shape(mesh, d, "data") for name, d in dims.items()}
    return fn, (w, momentum, make_shape(mesh, (16, 32, width), "data"))


def prepare_mnist(lib, mesh):
    """Return the example's training step as one would write it in plain jax."""
    layers = models.layers_of("cnn", dropout=0)
    params = models.init(layers, 0)

    def loss_of(w, batch):
        logits = models.apply(layers, w, batch["image"], None)
        return jnp.mean(kernels.cross_entropy(logits, batch["label"]) * batch["weight"])

    def step(w, momentum, batch):
        loss, grads = jax.value_and_grad(loss_of)(lib.vary(w, "data"), batch)
        grads = lib.pmean(grads, "data", name="grads")
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        w = jax.tree.map(lambda w, m: w - 0.02 * m, w, momentum)
        return w, momentum, lib.pmean(loss, "data", name="loss")

    fn = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    w = jax.tree.map(lambda leaf: make_shape(mesh, leaf.shape), params)
    batch = jax.tree.map(
        lambda v: make_shape(mesh, v.shape, "data", dtype=v.dtype), make_images(8 * DEVICES)
    )
    return fn, (w, w, batch)


def make_images(count):
    return {
        "image": np.zeros((count, 28, 28, 1), np.float32),
        "label": np.zeros(count, np.int32),
        "mask": np.ones(count, np.float32),
        "weight": np.ones(count, np.float32),
    }


def report_of_the_example(target):
    """Audit the MNIST example's own step, on the engine."""
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:1]),
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.sgd(0.02, momentum=0.9),
    )
    layers = models.layers_of("cnn", dropout=0)
    state = engine.create_state(models.init(layers, 0))
    step, _ = train.make_steps(layers)
    return engine.audit(step, state, make_images(8), target=target, mesh={"data": DEVICES})


def of_a_tree(call, *, mixed=False):
    """Return a program that calls one collective on a tree of six leaves."""

    def build(lib, mesh):
        fn = jax.shard_map(
            lambda x: call(lib, x), mesh=mesh, in_specs=P("data"), out_specs=P("data")
        )
        leaf = make_shape(mesh, (DEVICES * 8, DEVICES * 4), "data")
        return fn, ({f"w{i}": leaf for i in range(6)},)

    return build


def backward_of_vary(lib, x):
    def loss_of(w):
        w = lib.vary(w, "data", name="params")
        return sum((w[name] * x[name]).sum() for name in x)

    grads = jax.grad(loss_of)(jax.tree.map(lambda v: jnp.ones(v.shape), x))
    return lib.vary(grads, "data")


def count_both(lib, x):
    """Two calls with names of their own: what a loss and gradients are."""
    return lib.vary((lib.psum(x, "data", name="a"), lib.pmean(x, "data", name="b")), "data")


PROGRAMS = {
    "MNIST's CNN": prepare_mnist,
    "12-layer MLP": prepare_mlp,
    "block, ZeRO 1": prepare_block,
    "psum": of_a_tree(lambda lib, x: lib.vary(lib.psum(x, "data"), "data")),
    "pmean": of_a_tree(lambda lib, x: lib.vary(lib.pmean(x, "data"), "data")),
    "pmax": of_a_tree(lambda lib, x: lib.vary(lib.pmax(x, "data"), "data")),
    "pmin": of_a_tree(lambda lib, x: lib.vary(lib.pmin(x, "data"), "data")),
    "broadcast": of_a_tree(lambda lib, x: lib.vary(lib.broadcast(x, "data", root=2), "data")),
    "all_gather": of_a_tree(lambda lib, x: lib.all_gather(x, "data")),
    "reduce_scatter": of_a_tree(lambda lib, x: lib.reduce_scatter(x, "data")),
    "all_to_all": of_a_tree(lambda lib, x: lib.all_to_all(x, "data", split_dim=1, concat_dim=0)),
    "ppermute": of_a_tree(lambda lib, x: lib.ppermute(x, "data", RING)),
    "vary, backward": of_a_tree(backward_of_vary),
    "psum and pmean": of_a_tree(count_both),
}


def audit_steps(name, target):
    """Return the audits of a program written with txcore, and in plain jax."""

    def audited(lib):
        return audit(lambda mesh: PROGRAMS[name](lib, mesh), target=target, mesh={"data": DEVICES})

    own = report_of_the_example(target) if name == "MNIST's CNN" else audited(tx)
    return own, audited(PLAIN)


def count(report):
    """Return how many ops each kind of collective has, by HLO's names."""
    kinds = {row.op: row.kind for row in report.collectives if row.origin != "opaque"}
    return Counter(kinds.values())


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--program", action="append", choices=PROGRAMS)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    targets = args.target or TARGETS
    packages = [f"jax {jax.__version__}"]
    for package in ("libtpu", "jax-cuda12-plugin"):
        try:
            packages.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            packages.append(f"no {package}")
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, ",
        end="",
    )
    print(", ".join(packages))
    rows = []
    for name in args.program or PROGRAMS:
        row = [name]
        for target in targets:
            own, plain = (sum(count(report).values()) for report in audit_steps(name, target))
            row.append(f"{own} / {plain}" + (" MORE" if own > plain else ""))
        rows.append(row)
    print("collectives compiled, txcore / plain jax")
    print(tabulate(rows, headers=["", *targets], tablefmt="github"))


if __name__ == "__main__":
    main()
