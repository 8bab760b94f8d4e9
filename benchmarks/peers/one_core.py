"""The MNIST step of one device on one core, beside PyTorch's, in float32 and bfloat16.

    python benchmarks/peers/one_core.py --torch TORCH_ENVIRONMENT/bin/python

CPU milliseconds of a step, in turns: 64 images of `cnn3x3` without dropout that lie in memory.
PyTorch's is in `channels_last`, its bfloat16 by autocast; ours is compiled by the engine's options,
and by each that --ynn names besides.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
sys.path.append(str(HERE.parents[1] / "examples" / "mnist"))
PRECISIONS = ("float32", "bfloat16")
IMAGES, STEPS = 64, 20


def serve_torch():
    """Answer "PRECISION STEPS" lines by the CPU seconds of a step."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch_worker import Net, autocast, image_tensor

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    images = image_tensor(rng.random((IMAGES, 28, 28, 1), np.float32), "best")
    labels = torch.from_numpy(rng.integers(0, 10, IMAGES))
    models = {name: Net().to(memory_format=torch.channels_last) for name in PRECISIONS}
    optimizers = {
        name: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        for name, model in models.items()
    }

    def step(precision):
        optimizers[precision].zero_grad(set_to_none=True)
        with autocast(precision):
            loss = F.cross_entropy(models[precision](images), labels)
        loss.backward()
        optimizers[precision].step()
        return loss.detach()

    print(json.dumps(torch.__version__), flush=True)
    for line in sys.stdin:
        precision, count = line.split()
        started = time.process_time()
        for _ in range(int(count)):
            loss = step(precision)
        float(loss)
        print(json.dumps((time.process_time() - started) / int(count)), flush=True)


def prepare(precision, ynn):
    """Return a function that makes so many of our steps; by the engine's options without `ynn`."""
    import jax
    import mnist_step

    from txcore.train.batches.placer import shard_batch

    given = {} if ynn is None else {"compiler_options": {OPTION: ynn}}
    engine, step, state, batch = mnist_step.prepare_step("cnn3x3", 1, precision=precision, **given)
    batch = shard_batch(batch, engine.mesh, engine.plan)

    def run(steps):
        nonlocal state
        for _ in range(steps):
            state, metrics = engine.run(step, state, batch)
        jax.block_until_ready((state, metrics))

    return run


OPTION = "xla_cpu_experimental_ynn_fusion_type"


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ynn", nargs="*", default=[], help=f"further values of {OPTION}")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve_torch()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    peer = subprocess.Popen(
        [args.torch, __file__, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    version = json.loads(peer.stdout.readline())

    def ask(precision, steps):
        peer.stdin.write(f"{precision} {steps}\n")
        return json.loads(peer.stdout.readline())

    forms = {(p, ynn): prepare(p, ynn) for p in PRECISIONS for ynn in (None, *args.ynn)}
    for run in forms.values():
        run(5)
    for precision in PRECISIONS:
        ask(precision, 5)
    ours, theirs = {form: [] for form in forms}, {precision: [] for precision in PRECISIONS}
    for _ in range(args.rounds):
        for form, run in forms.items():
            started = time.process_time()
            run(STEPS)
            ours[form].append((time.process_time() - started) / STEPS)
        for precision in PRECISIONS:
            theirs[precision].append(ask(precision, STEPS))
    print(f"torch {version}, {args.rounds} rounds of {STEPS} steps, CPU ms a step")
    for precision, own in theirs.items():
        print(f"{precision:9s} {'torch':40s} {1e3 * statistics.median(own):6.2f}")
    for (precision, ynn), own in ours.items():
        ratio = statistics.median(t / o for t, o in zip(theirs[precision], own, strict=True))
        name = "txcore" if ynn is None else f"txcore, ynn_fusion_type={ynn!r}"
        median = 1e3 * statistics.median(own)
        print(f"{precision:9s} {name:40s} {median:6.2f}, torch / this {ratio:.2f}")
    peer.stdin.close()
    peer.wait()
    return None


if __name__ == "__main__":
    main()
