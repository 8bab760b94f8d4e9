"""Strangers at the ports of a run that is under way neither join nor break it."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from joining import (
    clean_environment,
    place,
    refused,
    said,
    start,
)
from machine import within
from processes import finish, free_port, killed_at_the_end

from txcore.launch.join.seal_port import seal_listeners

# A stranger that uses jax's own client, and says that it is process 1.
CLAIMS_TO_BE_1 = """
import sys, jax
jax.config.update("jax_enable_recoverability", True)
jax.distributed.initialize(sys.argv[1], 2, 1, initialization_timeout=1)
print("it is in")
"""


@pytest.fixture
def run(tmp_path):
    """Two processes that have joined, and go on when the file is there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if not seal_listeners(listener.getsockname()[1]):
            pytest.skip("this system has no /proc/net, or no filters for sockets")
    port, go_on = free_port(), tmp_path / "go-on"
    ranks = [start(place(port, 2, rank, stay_until=str(go_on))) for rank in range(2)]
    with killed_at_the_end(*ranks):
        lines = [next(line for line in rank.stdout if line.startswith("{")) for rank in ranks]
        yield ranks, port, go_on, [json.loads(line) for line in lines]


def assert_unharmed(run):
    ranks, _, go_on, _ = run
    assert [rank.poll() for rank in ranks] == [None, None]
    go_on.touch()
    assert [said(ended)["sum"] for ended in finish(*ranks)] == [[11.0], [11.0]]


def ports_of(words):
    return [int(text.rpartition(":")[2], 16) for text in words["listening_with_backend"]]


@pytest.mark.slow
def test_a_client_that_claims_the_id_of_another(run):
    port = run[1]
    command = [sys.executable, "-c", CLAIMS_TO_BE_1, f"127.0.0.1:{port}"]
    stranger = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert stranger.returncode != 0
    assert "it is in" not in stranger.stdout
    assert_unharmed(run)


@pytest.mark.parametrize("rank", [0, 1])
def test_another_process_with_an_id_of_the_run(run, rank):
    port = run[1]
    begun = time.monotonic()
    (ended,) = finish(start(place(port, 2, rank, timeout_s=300)))
    assert within(time.monotonic() - begun, 30)
    host = socket.gethostname()
    why = (
        f"process_id={rank} is taken by a process on {host}, and another on {host} has it too: "
        "give each its own, from 0 to 1, and each run a port of its own"
    )
    if rank == 0:
        cannot = (
            f"process 0 needs to listen on 127.0.0.1:{port}, but cannot (Address already in use"
        )
        why = f"{cannot}; {why}): "
    begins = f"RuntimeError: tx.initialize of process {rank} of 2 at 127.0.0.1:{port}: {why}"
    assert refused(ended).startswith(begins)
    assert_unharmed(run)


def test_garbage_and_connections_that_say_nothing(run):
    _, coordinator, _, words = run
    ports = [port for each in words for port in ports_of(each)]
    assert coordinator in ports
    gloo = [port for port in ports if port != coordinator]
    assert len(gloo) == 2
    with socket.create_connection(("127.0.0.1", coordinator), timeout=5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(1) == b"", "this is answered by jax's server"
    connections = []
    for port in [*gloo, coordinator] * 50:
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        connection.sendall(os.urandom(len(connections) * 7 % 300))
        connections.append(connection)
    for connection in connections[::2]:
        connection.close()
    assert_unharmed(run)
    for connection in connections:
        connection.close()
