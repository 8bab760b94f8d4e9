"""The small GPT for machines that are not here: its plan's step beside an auto-sharded twin.

    python benchmarks/gpt_targets.py [--target cuda:h100:64x8] [--mesh data=8,pipe=8,model=8]
                                     [--only twin]

Needs the extras tpu-target and gpu-target. The twin is the same model, sizes and shardings under
plain `jax.jit` with NamedShardings: a scan over its stacked layers, and no collective of its own.
"""

import argparse
import os
import pathlib
import sys
import time
from collections import Counter

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compilers' plugins would look for devices
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "examples" / "gpt_small"))

import cli
import communication
import jax
import jax.numpy as jnp
import model
import numpy as np
import train
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.profiling import audit
from txcore.profiling.targets import parse_target

TARGETS = ("cuda:h100:64x8", "tpu:v5p:8x8x8")


def make_config(args):
    """Return the model: two layers a stage at least, and heads for every device."""
    return model.GPT(
        vocabulary=args.vocabulary,
        length=args.length,
        width=args.width,
        layers=args.layers,
        heads=args.heads,
        kv_heads=args.heads,
    )


def make_plan(config, args):
    """Return the plan."""
    return tx.Plan(
        data_parallel=tx.DP("data"),
        tensor_parallel=tx.TP("model", rules=config.tensor_rules),
        pipeline=tx.PP("pipe", microbatches=args.microbatches, schedule=args.schedule),
        context="context",
    )


def audit_plan(config, plan, target, sizes, args):
    """Return the report of the step under its plan, and the seconds that it took."""
    mesh = tx.MeshSpec(jax.devices("cpu")[:1], axes=model.AXES, shape=(1,) * 4)
    optimizer = tx.optim.adamw(1e-3, clip_norm=1.0)
    engine = tx.Engine(mesh=mesh, plan=plan, optimizer=optimizer, precision="bfloat16")
    state = engine.create_state(model.init(config))
    tokens = jax.ShapeDtypeStruct((args.rows, config.length), np.int32)
    batch = {"tokens": tokens, "labels": tokens}
    started = time.perf_counter()
    report = engine.audit(train.make_steps(config)[0], state, batch, target=target, mesh=sizes)
    return report, time.perf_counter() - started


def plain_loss(config, params, batch):
    """Return the mean loss of the same model in plain jax.numpy, computed in bfloat16."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    rows, length = batch["tokens"].shape
    shared = config.heads // config.kv_heads
    half = config.features // 2
    angles = jnp.arange(length)[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = (f(angles)[:, None].astype(jnp.bfloat16) for f in (jnp.cos, jnp.sin))

    def rotate(x):
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def layer(x, own):
        made = model.normalise(x, own["norm1"]) @ own["qkv"]
        made = made.reshape(rows, length, config.kv_heads, shared + 2, config.features)
        q = made[..., :shared, :].reshape(rows, length, config.heads, config.features)
        k, v = made[..., shared, :], made[..., shared + 1, :]
        out = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + out.reshape(rows, length, -1) @ own["out"]
        return x + jax.nn.gelu(model.normalise(x, own["norm2"]) @ own["up"]) @ own["down"], None

    x = jax.lax.scan(layer, params["embedding"][batch["tokens"]], params["blocks"])[0]
    logits = (model.normalise(x, params["norm"]) @ params["head"]).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, batch["labels"][..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)


def audit_twin(config, plan, target, sizes, args):
    """Return the same of the auto-sharded twin: gradient descent, without microbatches."""
    machine = parse_target(target)
    mesh = machine.mesh(sizes)
    spec = tx.MeshSpec(list(mesh.devices.flat), tuple(sizes), tuple(sizes.values()))
    layouts = plan.layouts(
        jax.eval_shape(lambda: jax.tree.map(jnp.asarray, model.init(config))), spec
    )

    def place(leaf, layout):
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, layout.stored)
        )

    params = jax.tree.map(place, model.init(config), layouts)
    rows = NamedSharding(mesh, P("data"))
    tokens = jax.ShapeDtypeStruct(
        (args.rows * sizes["data"], config.length), np.int32, sharding=rows
    )

    def step(params, batch):
        loss, grads = jax.value_and_grad(lambda p: plain_loss(config, p, batch))(params)
        return loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    whole = NamedSharding(mesh, P())
    jitted = jax.jit(step, out_shardings=(whole, shardings), donate_argnums=0)
    started = time.perf_counter()
    given = params, {"tokens": tokens, "labels": tokens}
    report = audit(lambda: (jitted, given), target=target)
    return report, time.perf_counter() - started


def describe(name, report, seconds):
    """Print what an audit found."""
    memory = report.program.compiled.memory_analysis()
    given, temporary = (
        size / 2**20 for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    )
    print(f"## {name}: {report.status}, exact {report.exact}, {seconds:.1f} s to compile and read")
    print(
        f"memory a device {given + temporary:.1f} MiB: arguments {given:.1f}, temporary "
        f"{temporary:.1f}"
    )
    rows, sent = Counter(), Counter()
    for c in report.collectives:
        key = c.origin, c.kind, "+".join(c.axes or ("?",))
        rows[key] += c.trips or 1
        sent[key] += c.payload_bytes * (c.trips or 1)
    for key in sorted(rows):
        print(f"| {' | '.join(key)} | {rows[key]} | {sent[key] / 2**20:.2f} MiB |")
    print(report.verdict(), flush=True)


def show_plan(config, plan, target, sizes, args):
    """Print what the audit of the plan found, beside what formulas say."""
    report, seconds = audit_plan(config, plan, target, sizes, args)
    describe("plan", report, seconds)
    formula = communication.predict(config, plan, sizes, args.rows * sizes["data"], "bfloat16")
    print(f"formula of the layers: {sum(s.payload_bytes for s in formula) / 2**20:.2f} MiB")
    for line in report.plan:
        print(
            f"  {line.what} {line.kind} {line.axes} {line.dtype}: predicted "
            f"{line.payload_bytes}, found {line.found_bytes}"
        )


def main():
    """Compile both for each target."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--target", nargs="+", default=TARGETS)
    add("--mesh", default="data=8,pipe=8,model=8")
    for name, value in (("layers", 16), ("width", 512), ("heads", 16), ("length", 512)):
        add(f"--{name}", type=int, default=value)
    add("--vocabulary", type=int, default=8192)
    add("--microbatches", type=int, default=16)
    add("--rows", type=int, default=32, help="of a data shard")
    add("--schedule", default="1f1b")
    add("--only", choices=("plan", "twin"), help="compile one of the two")
    args = parser.parse_args()
    sizes, config = cli.read_mesh(args.mesh), make_config(args)
    config.check(sizes)
    plan = make_plan(config, args)
    for target in args.target:
        print(f"# {target}, {args.mesh}")
        if args.only != "twin":
            show_plan(config, plan, target, sizes, args)
        if args.only != "plan":
            describe("auto-sharded twin", *audit_twin(config, plan, target, sizes, args))


if __name__ == "__main__":
    main()
