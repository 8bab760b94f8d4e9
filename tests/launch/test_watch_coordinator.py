"""How the end of the coordinator's process is noticed."""

import select
import socket
import threading
import time

import pytest
from machine import within

from txcore.launch.watch.coordinator import CoordinatorWatch

needs_linux = pytest.mark.skipif(not hasattr(select, "POLLRDHUP"), reason="Linux tells of it")


@needs_linux
def test_the_end_of_the_last_connection_is_noticed():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        pairs = [(socket.create_connection(server.getsockname()), server.accept()[0])]
        pairs.append((socket.create_connection(server.getsockname()), server.accept()[0]))
        watched = CoordinatorWatch(address)
        assert not watched.wait(0.01)
        pairs[0][1].close()
        assert not watched.wait(0.5), "one is left"
        started = time.monotonic()
        assert not watched.wait(0.1)
        assert time.monotonic() - started > 0.09, "it asks again and again"
        pairs[1][1].close()
        assert watched.wait(5)
        watched.close()
        for pair in pairs:
            pair[0].close()


def test_the_guard_is_woken():
    watched = CoordinatorWatch(None)
    threading.Timer(0.1, watched.wake).start()
    started = time.monotonic()
    assert not watched.wait(30)
    assert within(time.monotonic() - started, 10)
    assert not watched.wait(0.01)
    watched.close()


@pytest.mark.parametrize("address", [None, "127.0.0.1:1", "no port"])
def test_without_connections_nothing_breaks(address):
    watched = CoordinatorWatch(address)
    assert not watched.wait(0.01)
    watched.close()
