"""The small GPT beside plain PyTorch: one loss curve, and the CPU seconds of a step in turns.

    python benchmarks/peers/gpt_compare.py --torch TORCH_ENVIRONMENT/bin/python

Same initial weights, batches and optimizer (AdamW without decay). The curve is compared on one
device and on data=2,model=2,pipe=2 of 8 simulated ones; the seconds on one device alone: those of
all its threads, which a busy machine does not stretch as it does the clock's.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "examples" / "gpt_small"))
RATE = 1e-3


def parse():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--torch", default=sys.executable, help="a Python that has torch")
    add("--threads", type=int, default=1)
    add("--precision", default="float32", choices=["float32", "bfloat16"])
    add("--compiled", action="store_true", help="torch.compile the peer")
    add("--steps", type=int, default=50, help="of the curve; 0 for none")
    add("--rounds", type=int, default=5, help="of timing; 0 for none")
    add("--meshes", nargs="*", default=["data=1", "data=2,model=2,pipe=2"])
    for name, value in (("batch", 16), ("length", 128), ("width", 128), ("layers", 4)):
        add(f"--{name}", type=int, default=value)
    return parser.parse_args()


class Peer:
    """The same model in plain PyTorch, in a process that answers a line with a line of JSON."""

    def __init__(self, args, file):
        self.form = "compiled" if args.compiled else "eager"
        words = [file, str(args.threads), args.precision, self.form]
        self.process = subprocess.Popen(
            [args.torch, HERE / "gpt_torch.py", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self.process.stdout.readline().strip() == "ready"

    def ask(self, line):
        """Return what it answers."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        """Let it end."""
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Ours:
    """The model, its first parameters and batches, and its step."""

    config: Any
    params: Any
    batches: list
    step: Any
    precision: str

    def start(self, mesh_text):
        """Return the state before the first step on a mesh."""
        import cli

        import txcore as tx

        sizes = cli.read_mesh(mesh_text)
        plan = tx.Plan(
            data_parallel=tx.DP("data"),
            tensor_parallel=tx.TP("model", rules=self.config.tensor_rules),
            pipeline=tx.PP("pipe", microbatches=2 if sizes["pipe"] > 1 else 1),
            context="context",
        )
        engine = tx.Engine(
            mesh=cli.make_mesh(sizes, 1),
            plan=plan,
            optimizer=tx.optim.adamw(RATE, weight_decay=0.0),
            precision=self.precision,
        )
        return engine.create_state(self.params)


def prepare(args):
    """Make the model, its parameters and batches."""
    import data
    import model
    import train

    config = model.GPT(length=args.length, width=args.width, layers=args.layers)
    windows = data.Windows(args.batch, config.length, 1, (1, 0))
    shuffled = windows.shuffled(data.load(None)[1], 0, 0)
    batches = [b for b, _ in zip(shuffled, range(max(args.steps, 5)), strict=False)]
    step = train.make_steps(config)[0]
    return Ours(config, model.init(config), batches, step, args.precision)


def write_for_peer(ours, file):
    """Write what both start from."""
    import numpy as np

    leaves = {f"blocks/{k}": v for k, v in ours.params["blocks"].items()}
    leaves |= {k: v for k, v in ours.params.items() if k != "blocks"}
    stacked = {k: np.stack([b[k] for b in ours.batches]) for k in ("tokens", "labels")}
    np.savez(file, config=json.dumps(vars(ours.config)), rate=RATE, **leaves, **stacked)


def compare_curves(ours, peer, meshes, steps):
    """Print how far the losses of each mesh are from the peer's."""
    import numpy as np

    theirs = np.array(peer.ask("curve"))
    for name in meshes:
        state, losses = ours.start(name), []
        for batch in ours.batches[:steps]:
            state, metrics = ours.step(state, batch)
            losses.append(float(metrics["loss"]))
        apart = np.abs(np.array(losses) / theirs[: len(losses)] - 1)
        print(
            f"{name}: {len(losses)} steps, loss {losses[0]:.6f} to {losses[-1]:.6f}; torch "
            f"{theirs[0]:.6f} to {theirs[len(losses) - 1]:.6f}; largest relative difference "
            f"{apart.max():.2e} at step {apart.argmax() + 1}",
            flush=True,
        )


def compare_seconds(ours, peer, args):
    """Print the CPU seconds of a step of both, measured in turns."""
    import jax

    state = ours.start("data=1")
    for batch in ours.batches[:2]:
        state, metrics = ours.step(state, batch)
    peer.ask("time 2")
    pairs = []
    for _ in range(args.rounds):
        started = time.process_time()
        for batch in ours.batches[:5]:
            state, metrics = ours.step(state, batch)
        jax.block_until_ready(metrics)
        pairs.append(((time.process_time() - started) / 5, peer.ask("time 5")))
    ratios = sorted(their_s / our_s for our_s, their_s in pairs)
    for our_s, their_s in pairs:
        print(f"  ours {1e3 * our_s:.1f} ms, torch {1e3 * their_s:.1f} ms")
    print(
        f"{args.precision}, {args.threads} threads, {peer.form}: torch / ours, median "
        f"{ratios[len(ratios) // 2]:.2f}"
    )


def main():
    """Compare."""
    args = parse()
    if args.threads == 1:  # of one device
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    import jax

    from txcore import launch

    if args.steps:
        launch.simulate_cpu_devices(8)
    ours = prepare(args)
    file = pathlib.Path(tempfile.mkdtemp()) / "gpt.npz"
    write_for_peer(ours, file)
    peer = Peer(args, file)
    jax.devices()
    if args.steps:
        compare_curves(ours, peer, args.meshes, args.steps)
    if args.rounds:
        compare_seconds(ours, peer, args)
    peer.close()


if __name__ == "__main__":
    main()
