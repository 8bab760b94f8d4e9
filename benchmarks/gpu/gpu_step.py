"""The part of a run on a GPU that times the MNIST step, beside the same step in plain jax."""

import statistics
import time
from functools import partial

import gpu_cases
from gpu_cases import max_pool

TOGETHER = 10  # steps of one program, and those that the profiler records at once


def time_steps() -> list[dict]:
    """Time the MNIST step `cnn3x3` without dropout by `Engine.run`, and in plain jax."""
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
                "txcore Engine.run": prepare_engine(engine, run, models.init(layers, seed=0), host),
                f"txcore Engine.run_many, {TOGETHER} at once": prepare_engine(
                    engine, run, models.init(layers, seed=0), host, TOGETHER
                ),
                "plain jax.jit": prepare_plain(models.init(layers, seed=0), host, precision),
            }
            rows += time_calls(f"step cnn3x3 b{batch_size} {precision}", calls)
            print(rows[-2 * len(calls) :], flush=True)
    return rows


def time_calls(case, calls) -> list[dict]:
    """Time functions that run a number of steps: a step by the host's clock, and on the device."""
    from txcore.kernels.tuning import timing

    if gpu_cases.is_dry():
        return [{"case": case, "name": name} for name in calls]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(7):
        for name, call in calls.items():
            call(TOGETHER)
            start = time.perf_counter()
            call(100)
            times[name].append((time.perf_counter() - start) * 1e4)
    rows = [
        {"case": f"{case} (host)", "name": name, "us": statistics.median(taken)}
        for name, taken in times.items()
    ]
    device = timing.device_times({n: partial(call, TOGETHER) for n, call in calls.items()}, 5)
    for name, (us, count) in device.items():
        row = {"case": f"{case} (device)", "name": name}
        rows.append(row | {"us": us / TOGETHER, "kernels": count / TOGETHER})
    return rows


def prepare_engine(engine, step, params, host, together=1):
    """Return a function that runs a number of steps by the engine and waits for the last.

    As for plain jax, the batch lies on the device. `together` of them are one program.
    """
    import jax

    from txcore.train.batches.placer import shard_batch

    state = [engine.create_state(params)]
    batch = shard_batch(host, engine.mesh, engine.plan)

    def run_steps(count):
        for _ in range(count // together):
            if together == 1:
                state[0], metrics = engine.run(step, state[0], batch)
            else:
                state[0], metrics = engine.run_many(step, state[0], [batch] * together)
        jax.block_until_ready((state[0].params, metrics))

    run_steps(together)
    return run_steps


def prepare_plain(params, host, precision):
    """Return a function that runs a number of steps in plain jax, as anyone would write them."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    def compute_logits(params, x):
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
        logits = compute_logits(cast, batch["image"].astype(precision)).astype(jnp.float32)
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

    def run_steps(count):
        for _ in range(count):
            state[0], state[1], loss = jitted(*state, batch)
        jax.block_until_ready((state, loss))

    run_steps(3)
    return run_steps
