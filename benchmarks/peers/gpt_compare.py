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


def main():
    """Compare."""
    args = parse()
    if args.threads == 1:  # of one device
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    import cli
    import data
    import jax
    import model
    import numpy as np
    import train

    import txcore as tx

    config = model.GPT(length=args.length, width=args.width, layers=args.layers)
    windows = data.Windows(args.batch, config.length, 1, (1, 0))
    text = data.load(None)[1]
    count = max(args.steps, 5)
    batches = [b for b, _ in zip(windows.shuffled(text, 0, 0), range(count), strict=False)]
    params = model.init(config)
    leaves = {f"blocks/{k}": v for k, v in params["blocks"].items()}
    leaves |= {k: v for k, v in params.items() if k != "blocks"}
    file = pathlib.Path(tempfile.mkdtemp()) / "gpt.npz"
    stacked = {k: np.stack([b[k] for b in batches]) for k in ("tokens", "labels")}
    np.savez(file, config=json.dumps(vars(config)), rate=RATE, **leaves, **stacked)

    form = "compiled" if args.compiled else "eager"
    peer = subprocess.Popen(
        [args.torch, HERE / "gpt_torch.py", file, str(args.threads), args.precision, form],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert peer.stdout.readline().strip() == "ready"

    def ask(line):
        peer.stdin.write(line + "\n")
        peer.stdin.flush()
        return json.loads(peer.stdout.readline())

    if args.steps:
        tx.launch.simulate_cpu_devices(8)
    jax.devices()
    step = train.make_steps(config)[0]

    def start(sizes):
        mesh = cli.make_mesh(sizes, 1)
        plan = tx.Plan(
            data_parallel=tx.DP("data"),
            tensor_parallel=tx.TP("model", rules=config.tensor_rules),
            pipeline=tx.PP("pipe", microbatches=2 if sizes["pipe"] > 1 else 1),
            context="context",
        )
        engine = tx.Engine(
            mesh=mesh,
            plan=plan,
            optimizer=tx.optim.adamw(RATE, weight_decay=0.0),
            precision=args.precision,
        )
        return engine.create_state(params)

    if args.steps:
        theirs = np.array(ask("curve"))
        for name in args.meshes:
            state, ours = start(cli.read_mesh(name)), []
            for batch in batches[: args.steps]:
                state, metrics = step(state, batch)
                ours.append(float(metrics["loss"]))
            apart = np.abs(np.array(ours) / theirs[: len(ours)] - 1)
            print(
                f"{name}: {len(ours)} steps, loss {ours[0]:.6f} to {ours[-1]:.6f}; torch "
                f"{theirs[0]:.6f} to {theirs[len(ours) - 1]:.6f}; largest relative difference "
                f"{apart.max():.2e} at step {apart.argmax() + 1}",
                flush=True,
            )
    if args.rounds:
        state = start(cli.read_mesh("data=1"))
        for batch in batches[:2]:
            state, metrics = step(state, batch)
        ask("time 2")
        pairs = []
        for _ in range(args.rounds):
            started = time.process_time()
            for batch in batches[:5]:
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            pairs.append(((time.process_time() - started) / 5, ask("time 5")))
        ratios = sorted(their_s / our_s for our_s, their_s in pairs)
        for our_s, their_s in pairs:
            print(f"  ours {1e3 * our_s:.1f} ms, torch {1e3 * their_s:.1f} ms")
        print(
            f"{args.precision}, {args.threads} threads, {form}: torch / ours, median "
            f"{ratios[len(ratios) // 2]:.2f}"
        )
    peer.stdin.close()
    peer.wait()


if __name__ == "__main__":
    main()
