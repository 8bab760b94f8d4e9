"""A free port for the processes that a test starts, and their ends."""

import contextlib
import random
import socket
import time

# Linux gives these to no connection by itself, so nobody takes one between here and its use.
PORTS = range(20_000, 30_000)
DEADLINE_S = 90


def free_port():
    """Return a port of loopback on which nobody listens."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with contextlib.suppress(OSError), socket.socket() as tried:
            tried.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")


@contextlib.contextmanager
def killed_at_the_end(*processes):
    """Leave no process behind."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finish(*processes, deadline_s=DEADLINE_S):
    """Wait for all; return (exit code, stdout, stderr) of each."""
    deadline = time.monotonic() + deadline_s
    with killed_at_the_end(*processes):
        texts = [p.communicate(timeout=max(1, deadline - time.monotonic())) for p in processes]
        return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]
