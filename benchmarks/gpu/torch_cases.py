"""The cases of run.py in PyTorch, by CUDA events: eager, as a replayed graph, and compiled."""

import statistics

import numpy as np
import torch
import torch.nn.functional as F

CALLS = 10  # in one graph, or between two events


def time_all() -> list[dict]:
    """Return one row for each case and way of running it."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    found = []
    for case, (function, compiled) in make_calls().items():
        ways = {"torch eager": function}
        if compiled:
            ways["torch compiled"] = torch.compile(function)
        for name, call in ways.items():
            found.append(time_call(case, name, call))
            found.append(time_call(case, f"{name}, graph", call, graph=True))
        print(found[-2:], flush=True)
    return found


def time_call(case: str, name: str, call, *, graph: bool = False) -> dict:
    """Return the row of a call, or why it failed."""
    try:
        return {"case": case, "name": name, "us": median_microseconds(call, graph=graph)}
    except Exception as error:  # a row says so, and the others are timed
        return {"case": case, "name": name, "why": f"{type(error).__name__}: {error}"[:300]}


def median_microseconds(call, *, graph: bool) -> float:
    """Return the median time of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    def call_many():
        for _ in range(CALLS):
            call()

    run = call_many
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call_many()
        run = captured.replay
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def make_calls() -> dict:
    """Return (call, whether to compile it too) by the case's name in run.py."""
    return {**make_updates(), **make_packing(), **make_losses(), **make_convolutions()}


def make_updates() -> dict:
    """Return the fused optimizers on one flat parameter."""
    made = {}
    for name, size in (("cnn3x3", 421_642), ("67M", 1 << 26)):
        for op, kind, options in (
            ("sgd", torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "fused": True}),
            ("adamw", torch.optim.AdamW, {"lr": 1e-3, "fused": True, "capturable": True}),
        ):
            p = torch.randn(size, device="cuda", requires_grad=True)
            p.grad = torch.randn_like(p)
            made[f"{op}-{name} float32"] = (kind([p], **options).step, False)
    return made


def make_packing() -> dict:
    """Return the concatenation of 200 short arrays."""
    sizes = np.random.default_rng(0).integers(64, 4096, 200)
    arrays = [torch.randn(int(n), device="cuda") for n in sizes]
    return {"pack-200-short float32": (lambda: torch.cat(arrays), False)}


def make_losses() -> dict:
    """Return the losses with their gradients."""
    made: dict = {}
    for name, n, c, dtype in (
        ("loss-4096x32k bfloat16", 4096, 32_000, torch.bfloat16),
        ("loss-4096x32k float32", 4096, 32_000, torch.float32),
        ("loss-4096x128k bfloat16", 4096, 128_256, torch.bfloat16),
    ):
        logits = torch.randn(n, c, device="cuda", dtype=dtype, requires_grad=True)
        labels = torch.randint(0, c, (n,), device="cuda")
        g = torch.linspace(-1, 1, n, device="cuda", dtype=dtype)

        def run(logits=logits, labels=labels, g=g):
            out = F.cross_entropy(logits, labels, reduction="none")
            return torch.autograd.grad(out, logits, g)

        made[name] = (run, name.startswith("loss-4096x32k b"))
    n, d, c = 4096, 2048, 32_000
    x = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(d, c, device="cuda") / 45).bfloat16().requires_grad_()
    b = torch.randn(c, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, c, (n,), device="cuda")
    g = torch.linspace(-1, 1, n, device="cuda", dtype=torch.bfloat16)

    def linear_loss():
        out = F.cross_entropy(x @ w + b, labels, reduction="none")
        return torch.autograd.grad(out, (x, w, b), g)

    made["linear-loss-4096x2048x32k bfloat16"] = (linear_loss, False)
    return made


def make_convolutions() -> dict:
    """Return the first convolutions with their gradients, channels last."""
    made = {}
    for size in (3, 5):
        x = torch.randn(256, 1, 28, 28, device="cuda").to(memory_format=torch.channels_last)
        w = torch.randn(32, 1, size, size, device="cuda", requires_grad=True)
        b = torch.randn(32, device="cuda", requires_grad=True)
        g = torch.ones(256, 32, 14, 14, device="cuda").to(memory_format=torch.channels_last)

        def run(x=x, w=w, b=b, g=g, size=size):
            y = F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=size // 2)), 2)
            return torch.autograd.grad(y, (w, b), g)

        made[f"conv1-{size}x{size}-b256 float32"] = (run, size == 3)
    return made
