"""The processes that a test starts: their port, their environment and their ends."""

import contextlib
import multiprocessing
import os
import pathlib
import random
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

# Linux gives these to no connection by itself, so nobody takes one between here and its use.
PORTS = range(20_000, 30_000)
DEADLINE_S = 90
ROOT = pathlib.Path(__file__).resolve().parent.parent


def free_port():
    """Return a port of loopback on which nobody listens."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with contextlib.suppress(OSError), socket.socket() as tried:
            tried.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")


def rank_environment(**more):
    """Return a rank's variables: this tree on CPU, without the number of devices of the tests."""
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return own | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | more


def start_ranks(worker, *args, count=2):
    """Start ranks of a worker that is called with the coordinator, its rank and `args`."""
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, worker, coordinator, str(rank), *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=rank_environment(),
        )
        for rank in range(count)
    ]


def call_in_process(function, *args, patience_s=600):
    """Return what `function(*args, pipe)` sends in a process of its own; None if it sends nothing.

    A process of its own can be killed, and its peak of memory is that of the function.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=function, args=(*args, there))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(patience_s) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


@contextlib.contextmanager
def killed_at_the_end(*processes):
    """Leave no process behind."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def patience(seconds):
    """Return how long to wait for what takes so long at most on an idle machine.

    The processes that wait for each core stretch it: where all is well, nobody waits so long.
    """
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def finish(*processes, deadline_s=DEADLINE_S):
    """Wait for all; return (exit code, stdout, stderr) of each.

    All are read at once: a rank that waits for a reader of its pipe keeps the others waiting.
    """
    seconds = patience(deadline_s)
    with killed_at_the_end(*processes), ThreadPoolExecutor(len(processes)) as pool:
        texts = list(pool.map(lambda process: process.communicate(timeout=seconds), processes))
        return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]
