"""Time of every kernel on one GPU, beside XLA's and PyTorch's: `python benchmarks/gpu/run.py`.

Each part is a process of its own with a limit, so that one that hangs costs the others nothing.
Device time is what the profiler records of kernels and copies (`timing.device_times`): no start
of a program is in it. Writes FOLDER/gpu_CARD.json, and the table beside it as .txt.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from functools import partial

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LEAST_GAIN = 1.05  # of another implementation than XLA's, to be recorded as the fastest
PARTS = {
    "ceilings": 60,
    "updates": 60,
    "packing": 90,
    "loss": 90,
    "conv": 120,
    "step": 90,
    "torch": 90,
}


def main() -> None:
    """Run the parts, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rows", help="(a part's own process) the file of its rows")
    parser.add_argument("--record", type=pathlib.Path, help="record what a .json found fastest")
    options = parser.parse_args()
    if options.record:
        record(options.record)
        return
    if options.rows:
        rows = RUN[options.parts[0]]()
        pathlib.Path(options.rows).write_text(json.dumps(rows))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    found, seconds = {}, {}
    for part in options.parts or PARTS:
        start = time.monotonic()
        found[part] = run_part(part, options.out)
        seconds[part] = round(time.monotonic() - start, 1)
        write(found, seconds, options.out)  # after each part: a limit from outside loses one alone
    print((options.out / f"{file_name(found)}.txt").read_text())


def run_part(part: str, folder: pathlib.Path) -> list[dict]:
    """Run one part in a process of its own, and return its rows, or the reason why not."""
    file = folder / f"part_{part}.json"
    log = folder / f"part_{part}.log"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'examples' / 'mnist'}"}
    command = [sys.executable, __file__, part, "--rows", str(file)]
    with log.open("w") as output:
        try:
            subprocess.run(
                command,
                env=environment,
                stdout=output,
                stderr=output,
                timeout=PARTS[part],
                check=True,
            )
        except subprocess.SubprocessError as error:
            tail = log.read_text(errors="replace").strip().splitlines()[-1:]
            return [{"case": part, "name": "failed", "why": f"{type(error).__name__}: {tail}"}]
    rows = json.loads(file.read_text())
    file.unlink()
    log.unlink()
    return rows


def write(found: dict, seconds: dict, folder: pathlib.Path) -> None:
    """Write the rows with what they were measured on, and the table of them."""
    here = machine_of(found)
    result = {"machine": here, "seconds": seconds, "parts": found}
    (folder / f"{file_name(found)}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{file_name(found)}.txt").write_text(table(found, here))


def machine_of(found: dict) -> dict:
    """Return what the first part says of the machine."""
    return next((r for r in found.get("ceilings", []) if r["name"] == "machine"), {})


def file_name(found: dict) -> str:
    """Return the name of the results' files, without what tells their kind."""
    return f"gpu_{machine_of(found).get('card', 'unknown').replace(' ', '_')}"


def table(found: dict, here: dict) -> str:
    """Return the table of all parts."""
    from tabulate import tabulate

    ceilings = {r["name"]: r["value"] for r in found.get("ceilings", []) if "value" in r}
    lines = [f"{name}: {value}" for name, value in here.items() if name not in ("name", "case")]
    lines += [f"measured {name}: {value:.4g}" for name, value in ceilings.items()]
    rows = []
    for part in found.values():
        best = {}
        for r in part:
            if "us" in r and r["name"].startswith("xla"):
                best[r["case"]] = min(best.get(r["case"], math.inf), r["us"])
        for r in part:
            if "us" not in r and "why" not in r:
                continue
            rows.append(
                (
                    r["case"],
                    r["name"],
                    f"{r['us']:.1f}" if "us" in r else "failed",
                    r.get("kernels", ""),
                    f"{r['bytes'] / r['us'] * 1e6 / ceilings['copy']:.2f}"
                    if {"bytes", "us"} <= set(r) and "copy" in ceilings
                    else "",
                    f"{best[r['case']] / r['us']:.2f}" if "us" in r and r["case"] in best else "",
                    f"{r['error']:.1e}" if "error" in r else r.get("why", "")[:70],
                    f"{r['temp_mb']:.0f}" if "temp_mb" in r else "",
                )
            )
    headers = ("case", "what", "us", "kernels", "of copy", "x XLA", "error", "temp MB")
    return "\n".join([*lines, "", tabulate(rows, headers, disable_numparse=True)]) + "\n"


def record(file: pathlib.Path) -> None:
    """Write the fastest of each problem to what txcore knows of this kind of device."""
    from txcore.kernels.dispatch import tuning_file

    result = json.loads(file.read_text())
    by_key: dict[str, list[dict]] = {}
    for row in (r for part in result["parts"].values() for r in part if "key" in r):
        by_key.setdefault(row["key"], []).append(row)
    entries = {}
    for key, rows in by_key.items():
        best = min(rows, key=lambda row: row["us"])
        xla = min((r for r in rows if r["implementation"] == "xla"), key=lambda row: row["us"])
        if xla["us"] <= LEAST_GAIN * best["us"]:
            best = xla
        times = {
            tuning_file.label_candidate(r["implementation"], r["config"]): float(f"{r['us']:.4g}")
            for r in rows
        }
        here = result["machine"]
        entries[key] = tuning_file.Entry(
            best["implementation"], best["config"], times, here["jax"], here["card"]
        )
    target = ROOT / "kernels" / "dispatch" / "recorded" / "gpu.json"
    tuning_file.write_entries(target, {**tuning_file.read_entries(target), **entries})


def ceilings() -> list[dict]:
    """Measure the card's copy and products, and name the card and the versions."""
    import jax
    import jax.numpy as jnp

    from txcore.kernels.tuning import timing

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    x = jax.random.normal(jax.random.key(0), (1 << 27,))
    side = jax.random.normal(jax.random.key(1), (8192, 8192))
    half = side.astype(jnp.bfloat16)
    calls = {
        "copy": plain(lambda x: x + 1, x),
        "matmul bf16": plain(jnp.dot, half, half),
        "matmul f32 (TF32)": plain(jnp.dot, side, side),
        "matmul f32 (highest)": plain(lambda a, b: jnp.dot(a, b, precision="highest"), side, side),
    }
    times = timing.device_times(calls, 7)
    made = {name: (8 * x.size if name == "copy" else 2 * 8192**3) for name in calls}
    rows = [
        {"case": "ceiling", "name": name, "value": made[name] / us * 1e6}
        for name, (us, _) in times.items()
    ]
    machine = {
        "name": "machine",
        "card": jax.devices()[0].device_kind,
        "driver": driver,
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    return [machine, *rows]


def plain(function, *operands):
    """Compile a plain jax function; return a call that waits for its end."""
    import jax

    compiled = jax.jit(function).lower(*operands).compile()
    jax.block_until_ready(compiled(*operands))

    def call():
        return jax.block_until_ready(compiled(*operands))

    call.temp = compiled.memory_analysis().temp_size_in_bytes
    return call


def cases(shape, dtype, operands, *, backward=True, others=None, rounds=15, named=None):
    """Time every implementation and configuration of a shape, and other expressions of it."""
    import jax

    from txcore.kernels.dispatch import registry
    from txcore.kernels.dispatch.tuned import fields_of
    from txcore.kernels.dispatch.tuning_file import label_candidate
    from txcore.kernels.tuning import measure, timing

    problem, implementations = measure.problem_of(shape, dtype)
    choices = {
        label_candidate(c.implementation, fields_of(c.config)): c
        for c in registry.list_candidates(problem, implementations, named)
    }
    start = time.monotonic()
    calls, failed = measure.compile_calls(
        shape, dtype, choices, backward=backward, operands=operands
    )
    print(shape.name, "compiled", round(time.monotonic() - start, 1), failed, flush=True)
    with jax.default_matmul_precision("highest"):  # else float32 products are TF32's
        # In this thread: others would not know of the precision.
        choice = next(c for c in choices.values() if c.implementation == "xla")
        true = measure.compile_call(shape, dtype, choice, backward=backward, operands=operands)
    truth = true()
    errors = {name: difference(call(), truth) for name, call in calls.items()}
    calls |= others or {}
    case = f"{shape.name} {jax.numpy.dtype(dtype).name}"
    moved = shape.count_bytes(dtype, backward=backward)
    rows = []
    for name, (us, count) in timing.device_times(calls, rounds).items():
        row = {"case": case, "name": name, "us": us, "kernels": count, "bytes": moved}
        if name in choices:
            choice = choices[name]
            row |= {"key": problem.key, "implementation": choice.implementation}
            row["config"] = fields_of(choice.config)
        if errors.get(name) is not None:
            row["error"] = errors[name]
        if hasattr(calls[name], "temp"):
            row["temp_mb"] = calls[name].temp / 1e6
        rows.append(row)
    rows += [{"case": case, "name": name, "why": why[:300]} for name, why in failed.items()]
    print(json.dumps(rows), flush=True)
    return rows


def difference(got, truth):
    """Return the largest relative distance of a leaf from the truth's; None of an update."""
    import jax

    if got is None or truth is None:
        return None
    return float(_difference(jax.tree.leaves(got), jax.tree.leaves(truth)))


def _difference(got, truth):
    import jax
    import jax.numpy as jnp

    @jax.jit
    def worst(got, truth):
        def one(a, b):
            a, b = a.astype(jnp.float32).ravel(), b.astype(jnp.float32).ravel()
            norm = jnp.sqrt(jnp.sum(b * b))
            return jnp.sqrt(jnp.sum((a - b) ** 2)) / jnp.where(norm == 0, 1, norm)

        return jnp.max(jnp.stack([one(a, b) for a, b in zip(got, truth, strict=True)]))

    if len(got) > 20:  # many arrays of one dtype: as one
        got, truth = ([jnp.concatenate([x.ravel() for x in xs])] for xs in (got, truth))
    return worst(got, truth)


def randoms(shapes, dtype):
    """Return normal arrays on the device."""
    import jax

    keys = jax.random.split(jax.random.key(7), len(shapes))
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def updates() -> list[dict]:
    """Time the flat updates and the norm."""
    import jax.numpy as jnp

    from txcore.kernels.tuning.shapes import bucket_shapes

    rows = []
    for name, size in (("cnn3x3", 421_642), ("odd-67M", (1 << 26) + 5), ("67M", 1 << 26)):
        for shape in bucket_shapes(name, size):
            operands = [jnp.abs(x) for x in randoms(shape.shapes, jnp.float32)]
            rows += cases(shape, "float32", operands, backward=False)
    return rows


def packing() -> list[dict]:
    """Time pack and unpack of a few long and of 200 short arrays, and other ways in XLA."""
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from txcore.kernels.tuning.shapes import Shape

    random = np.random.default_rng(0)
    short = tuple((int(n),) for n in random.integers(64, 4096, 200))
    long = tuple((n,) for n in (40_000_000, 9_000_001, 4_000_000, 1_500_000, 800_000))

    def update_slices(*arrays):
        out, start = jnp.zeros(sum(a.size for a in arrays), arrays[0].dtype), 0
        for a in arrays:
            out, start = lax.dynamic_update_slice(out, a, (start,)), start + a.size
        return out

    def two_levels(*arrays):
        parts = [jnp.concatenate(arrays[i : i + 16]) for i in range(0, len(arrays), 16)]
        return jnp.concatenate(lax.optimization_barrier(parts))

    rows = []
    for name, leaves in (("200-short", short), ("5-long", long)):
        arrays = randoms(leaves, jnp.float32)
        others = {
            "xla two levels": plain(two_levels, *arrays),
            "xla update slices": plain(update_slices, *arrays),
        }
        rows += cases(
            Shape(f"pack-{name}", "pack", leaves, fixed=tuple(range(len(leaves)))),
            "float32",
            arrays,
            others=others,
        )
        scaled = Shape(
            f"pack-{name}-to-bf16-scaled",
            "pack",
            leaves,
            {"dtype": "bfloat16", "scale": 0.5},
            fixed=tuple(range(len(leaves))),
        )
        rows += cases(scaled, "float32", arrays)
        flat = (sum(map(math.prod, leaves)),)
        shape = Shape(f"unpack-{name}", "unpack", (flat,), {"shapes": leaves}, fixed=(0,))
        rows += cases(shape, "float32", randoms([flat], jnp.float32))
    return rows


def loss() -> list[dict]:
    """Time the losses of large vocabularies, with gradients."""
    import jax
    import jax.numpy as jnp

    from txcore.kernels.tuning.shapes import linear_loss_shape
    from txcore.kernels.tuning.shapes import loss_shape as loss_shape

    def labels(rows, classes):
        return jax.random.randint(jax.random.key(3), (rows,), 0, classes)

    def whole(g, x, w, b, y):
        def of(x, w, b):
            logits = (x @ w + b).astype(jnp.float32)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], -1)[:, 0]

        out, transpose = jax.vjp(of, x, w, b)
        return out, transpose(g)

    rows = []
    for name, (n, c), dtype in (
        ("loss-4096x32k", (4096, 32_000), "bfloat16"),
        ("loss-4096x32k", (4096, 32_000), "float32"),
        ("loss-4096x128k", (4096, 128_256), "bfloat16"),
        ("loss-512x32k", (512, 32_000), "bfloat16"),
    ):
        operands = [*randoms([(n, c)], dtype), labels(n, c)]
        rows += cases(loss_shape(name, (n, c)), dtype, operands)
    n, d, c = 4096, 2048, 32_000
    x, w, b = randoms([(n, d), (d, c), (c,)], jnp.bfloat16)
    operands = [x, w / 45, b, labels(n, c)]
    others = {"xla whole logits": plain(whole, jnp.linspace(-1, 1, n), *operands)}
    rows += cases(
        linear_loss_shape("linear-loss-4096x2048x32k", (n, d), c),
        "bfloat16",
        operands,
        others=others,
    )
    return rows


def conv() -> list[dict]:
    """Time the first convolutions with their gradients, and the dense layer."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from txcore.kernels.tuning.shapes import conv_shape as conv_shape
    from txcore.kernels.tuning.shapes import dense_shape

    def textbook(g, x, w, b):
        def of(w, b):
            y = lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            y = jax.nn.relu(y + b)
            return max_pool(y)

        out, transpose = jax.vjp(of, w, b)
        return out, transpose(g)

    rows = []
    for size in (3, 5):
        for batch in (64, 256, 1024):
            for dtype in ("float32", "bfloat16") if (batch, size) == (256, 3) else ("float32",):
                shapes = ((batch, 28, 28, 1), (size, size, 1, 32), (32,))
                operands = randoms(shapes, dtype)
                g = jnp.ones((batch, 14, 14, 32), dtype)
                shape = conv_shape(
                    f"conv1-{size}x{size}-b{batch}",
                    *shapes[:2],
                    first=True,
                    activation="relu",
                    pool=2,
                )
                others = {"xla plain": plain(textbook, g, *operands)}
                rows += cases(shape, dtype, operands, others=others)
    shape = dense_shape("dense-512x1024x4096", (512, 1024), 4096, activation="relu")
    rows += cases(shape, "bfloat16", randoms(shape.shapes, jnp.bfloat16))
    return rows


def max_pool(x):
    """Pool windows of 2x2 pixels."""
    import jax.numpy as jnp
    from jax import lax

    window = (1, 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def step() -> list[dict]:
    """Time the MNIST step `cnn3x3` without dropout by `Engine.run`, and in plain jax."""
    import statistics

    import jax
    import models
    import numpy as np
    import train

    import txcore as tx

    layers = models.layers_of("cnn3x3", dropout=0)
    rows = []
    for batch_size in (128, 256, 1024):
        random = np.random.default_rng(0)
        host = {
            "image": random.random((batch_size, 28, 28, 1), np.float32),
            "label": random.integers(0, 10, batch_size).astype(np.int32),
            "mask": np.ones(batch_size, np.float32),
            "weight": np.ones(batch_size, np.float32),
        }
        for precision in ("float32", "bfloat16"):
            engine = tx.Engine(
                mesh=tx.MeshSpec(jax.devices()[:1]),
                plan=tx.Plan(data_parallel=tx.DP("data")),
                optimizer=tx.optim.sgd(0.02, momentum=0.9),
                precision=precision,
            )
            run, _ = train.make_steps(layers)
            calls = {
                "txcore Engine.run": run_engine(engine, run, models.init(layers, seed=0), host),
                "plain jax.jit": run_plain(models.init(layers, seed=0), host, precision),
            }
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(7):
                for name, call in calls.items():
                    call(5)
                    start = time.perf_counter()
                    call(100)
                    times[name].append((time.perf_counter() - start) * 1e4)
            rows += [
                {
                    "case": f"step cnn3x3 b{batch_size} {precision} (host)",
                    "name": name,
                    "us": statistics.median(taken),
                }
                for name, taken in times.items()
            ]
            from txcore.kernels.tuning import timing

            once = {name: partial(call, 1) for name, call in calls.items()}
            device = timing.device_times(once, 10)
            rows += [
                {
                    "case": f"step cnn3x3 b{batch_size} {precision} (device)",
                    "name": name,
                    "us": us,
                    "kernels": count,
                }
                for name, (us, count) in device.items()
            ]
            print(rows[-4:], flush=True)
    return rows


def run_engine(engine, step, params, host):
    """Return a function that makes so many steps and waits for the last."""
    import jax

    state = [engine.create_state(params)]
    batch = engine.shard_batch(host) if hasattr(engine, "shard_batch") else host

    def run(count):
        for _ in range(count):
            state[0], metrics = engine.run(step, state[0], batch)
        jax.block_until_ready((state[0].params, metrics))

    run(3)
    return run


def run_plain(params, host, precision):
    """Return the same in plain jax, as anyone would write it."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    def apply(params, x):
        for name in ("conv0", "conv1"):
            p = params[name]
            x = lax.conv_general_dilated(
                x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + p["b"])
            x = max_pool(x)
        x = x.reshape(len(x), -1)
        x = jax.nn.relu(x @ params["dense2"]["w"] + params["dense2"]["b"])
        return x @ params["dense3"]["w"] + params["dense3"]["b"]

    def loss_of(params, batch):
        cast = jax.tree.map(lambda x: x.astype(precision), params)
        logits = apply(cast, batch["image"].astype(precision)).astype(jnp.float32)
        log_p = jax.nn.log_softmax(logits)
        losses = -jnp.take_along_axis(log_p, batch["label"][:, None], -1)[:, 0]
        return jnp.mean(losses * batch["weight"])

    def train_step(params, velocity, batch):
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        return jax.tree.map(lambda p, v: p - 0.02 * v, params, velocity), velocity, loss

    jitted = jax.jit(train_step, donate_argnums=(0, 1))
    state = [jax.tree.map(jnp.array, params)]
    state.append(jax.tree.map(jnp.zeros_like, state[0]))
    batch = jax.device_put(host)

    def run(count):
        for _ in range(count):
            state[0], state[1], loss = jitted(*state, batch)
        jax.block_until_ready((state, loss))

    run(3)
    return run


def torch() -> list[dict]:
    """Time the same in PyTorch: eager, replayed as a CUDA graph, and compiled."""
    from torch_cases import rows

    return rows()


RUN = {
    "ceilings": ceilings,
    "updates": updates,
    "packing": packing,
    "loss": loss,
    "conv": conv,
    "step": step,
    "torch": torch,
}

if __name__ == "__main__":
    main()
