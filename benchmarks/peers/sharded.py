"""Sharded state beside PyTorch's: FSDP (`fully_shard`) and ZeroRedundancyOptimizer on gloo.

    python benchmarks/peers/sharded.py --torch PYTHON_WITH_TORCH [--rounds 3]

The same MLP, weights and batches in two processes of one thread each, AdamW. Every round runs each
system once, one after the other; times are medians of a round's steps, and of the rounds. The
losses of all have to agree.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

DEPTH, WIDTH, ROWS, STEPS, WARM = 8, 768, 64, 40, 10
RATE, DECAY = 1e-3, 0.01
SYSTEMS = ("txcore parameters", "torch fully_shard", "txcore optimizer", "torch ZeroRedundancy")


def make_weights() -> list[dict[str, np.ndarray]]:
    """Return the weights of the layers, (in, out)."""
    rng = np.random.default_rng(0)
    shape, scale = (WIDTH, WIDTH), WIDTH**-0.5
    return [
        {"w": rng.normal(size=shape, scale=scale).astype(np.float32), "b": np.zeros(WIDTH, "f4")}
        for _ in range(DEPTH)
    ]


def make_batch(step: int) -> np.ndarray:
    """Return the inputs of both ranks; the targets are the inputs themselves, rolled."""
    return np.random.default_rng(step).normal(size=(2 * ROWS, WIDTH)).astype(np.float32)


def run_txcore(system: str, rank: int, port: int) -> list[tuple[float, float]]:
    """Train with txcore; return loss and seconds of each step."""
    import jax
    import jax.numpy as jnp

    import txcore as tx

    tx.initialize(f"127.0.0.1:{port}", 2, rank)

    def block(p: Any, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(x @ p["w"] + p["b"])

    def loss_of(shards: Any, batch: Any) -> jax.Array:
        out = tx.zero.layers(block, shards, batch["x"])
        return tx.example_mean(jnp.mean((out - batch["y"]) ** 2, -1), axis="data")

    @tx.step_fn
    def step(state: tx.TrainState, batch: Any) -> Any:
        loss, grads = tx.value_and_grad(loss_of)(state.shards, batch)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}

    engine = tx.Engine(
        mesh=tx.MeshSpec(),
        plan=tx.Plan(data_parallel=tx.DP("data", shard=system.split()[1])),
        optimizer=tx.optim.adamw(RATE, weight_decay=DECAY),
    )
    state, seen = engine.create_state(make_weights()), []
    for i in range(STEPS):
        x = make_batch(i)[rank * ROWS : (rank + 1) * ROWS]
        batch = {"x": x, "y": np.roll(x, 1, axis=1)}
        started = time.perf_counter()
        state, metrics = step(state, batch)
        loss = float(metrics["loss"])
        jax.block_until_ready(state.stored_params)
        seen.append((loss, time.perf_counter() - started))
    return seen


def run_torch(system: str, rank: int, port: int) -> list[tuple[float, float]]:
    """Train with PyTorch; return loss and seconds of each step."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)

    class Block(nn.Module):
        def __init__(self, given: dict[str, np.ndarray]) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            with torch.no_grad():
                self.linear.weight.copy_(torch.from_numpy(given["w"].T.copy()))
                self.linear.bias.copy_(torch.from_numpy(given["b"]))

        def forward(self, x: Any) -> Any:
            return x + torch.tanh(self.linear(x))

    model: Any = nn.Sequential(*map(Block, make_weights()))
    options = {"lr": RATE, "weight_decay": DECAY}
    if "fully_shard" in system:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer: Any = torch.optim.AdamW(model.parameters(), foreach=False, **options)
    else:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **options)
    seen = []
    for i in range(STEPS):
        x = torch.from_numpy(make_batch(i)[rank * ROWS : (rank + 1) * ROWS])
        started = time.perf_counter()
        loss = ((model(x) - torch.roll(x, 1, 1)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        seen.append((float(total) / 2, time.perf_counter() - started))
    dist.destroy_process_group()
    return seen


def run_ranks(system: str, python: str) -> list[tuple[float, float]]:
    """Run a system in two processes; return what rank 0 has seen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    ranks = [
        subprocess.Popen(
            [python, __file__, "--rank", str(rank), "--port", str(port), "--system", system],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{system} failed")
    seen: list[tuple[float, float]] = json.loads(outputs[0].splitlines()[-1])
    return seen


def main() -> None:
    """Run one rank, or all systems in rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", help="a Python with PyTorch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("--system", choices=SYSTEMS)
    args = parser.parse_args()
    if args.rank is not None:
        run = run_txcore if args.system.startswith("txcore") else run_torch
        print(json.dumps(run(args.system, args.rank, args.port)))
        return
    if args.torch is None:
        parser.error("--torch is needed: a Python with PyTorch")
    losses: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for _ in range(args.rounds):
        for system in SYSTEMS:
            python = sys.executable if system.startswith("txcore") else args.torch
            seen = run_ranks(system, python)
            losses[system] = [loss for loss, _ in seen]
            times[system].append(statistics.median(seconds for _, seconds in seen[WARM:]))
            print(f"{system}: {1e3 * times[system][-1]:.1f} ms a step", flush=True)
    base = losses[SYSTEMS[0]]
    for system in SYSTEMS:
        apart = max(abs(a - b) / b for a, b in zip(losses[system], base, strict=True))
        middle = 1e3 * statistics.median(times[system])
        print(
            f"{system:22} {middle:7.1f} ms a step, loss {losses[system][0]:.5f} to "
            f"{losses[system][-1]:.5f}, apart from {SYSTEMS[0]} by {apart:.1e}"
        )


if __name__ == "__main__":
    main()
