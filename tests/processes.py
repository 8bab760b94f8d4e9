"""A free port for the processes that a test starts."""

import contextlib
import random
import socket

# Linux gives these to no connection by itself, so nobody takes one between here and its use.
PORTS = range(20_000, 30_000)


def free_port():
    """Return a port of loopback on which nobody listens."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with contextlib.suppress(OSError), socket.socket() as tried:
            tried.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")
