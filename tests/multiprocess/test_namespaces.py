"""Runs over two hosts: network namespaces of this machine, with own addresses and names."""

import json
import re
import subprocess
import sys

import pytest
from cluster_cases import (
    FLAGS,
    ROOT,
    STEPS,
    TRAIN,
    WORKER,
    curve,
    curve_by_hand,
    environment,
    need,
    need_root,
    words,
)
from namespaces import ADDRESSES, NAMES, two_hosts
from processes import patience

pytestmark = pytest.mark.slow
PORT = 23456
# As in /proc/net/tcp and tcp6.
FIRST, SECOND, LOOPBACK = "0100CB0A", "0200CB0A", "0100007F"


def mapped(address):
    return {address, f"0000000000000000FFFF0000{address}"}


@pytest.fixture
def hosts(tmp_path):
    need_root()
    need(["ip", "unshare"], ["iproute2"])
    with two_hosts(tmp_path) as hosts:
        yield hosts


def run(*commands, **more):
    """Run commands side by side; return exit code and output of each."""
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        texts = [process.communicate(timeout=patience(100))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, text) for p, text in zip(processes, texts, strict=True)]


def workers(hosts, coordinator, where=(0, 1), timeout_s=40, **more):
    """Run one process on each of the hosts."""
    own = {"coordinator": coordinator, "num_processes": len(where), "timeout_s": timeout_s}
    return run(
        *(
            hosts.command(host, sys.executable, WORKER, json.dumps(own | {"process_id": rank}))
            for rank, host in enumerate(where)
        ),
        **more,
    )


def listening(ended):
    """Return the sums, and the addresses on which each process listens."""
    assert [code for code, _ in ended] == [0] * len(ended), ended
    seen = words("".join(text for _, text in ended))
    assert [s["sum"] for s in seen] == [[11.0]] * len(ended)
    return [{a.partition(":")[0] for a in s["listening_with_backend"]} for s in seen]


def test_two_hosts_give_the_curve_of_processes_started_by_hand(hosts, tmp_path):
    place = ["--coordinator", f"{NAMES[0]}:{PORT}", "--num-processes", 2, "--process-id"]
    small = ("--model", "mlp")  # compiles in less than the processes take to start
    flags = [*FLAGS, *small, "--results", tmp_path / "results.json"]
    command = [sys.executable, TRAIN, *flags, *place]
    ended = run(*(hosts.command(rank, *command, rank) for rank in range(2)))
    assert [code for code, _ in ended] == [0, 0], ended
    assert curve(tmp_path / "results.json") == curve_by_hand(STEPS, *small)


def test_each_host_listens_on_its_own_address_only(hosts):
    first, second = listening(workers(hosts, f"{NAMES[0]}:{PORT}"))
    assert first <= mapped(FIRST)
    assert second <= mapped(SECOND)


def test_two_processes_of_one_host_listen_on_loopback_only(hosts):
    """Although the hostname means another address, which gloo would take by itself."""
    own = listening(workers(hosts, f"127.0.0.1:{PORT}", where=(0, 0)))
    assert own[0] <= mapped(LOOPBACK)
    assert own[1] <= mapped(LOOPBACK)


def test_hostnames_that_mean_loopback_do_no_harm(hosts):
    """As Debian's hosts file has it; gloo would tell the other host to connect to 127.0.1.1."""
    hosts.set_hosts(f"127.0.1.1 {NAMES[0]}\n", f"127.0.1.1 {NAMES[1]}\n")
    first, second = listening(workers(hosts, f"{ADDRESSES[0]}:{PORT}"))
    assert first <= mapped(FIRST)
    assert second <= mapped(SECOND)


def test_an_interface_for_gloo(hosts):
    first, second = listening(
        workers(hosts, f"{NAMES[0]}:{PORT}", where=(0, 0), GLOO_SOCKET_IFNAME="lo")
    )
    assert first <= mapped(FIRST) | mapped(LOOPBACK)
    assert mapped(LOOPBACK) & first
    assert second <= mapped(LOOPBACK)


def test_a_coordinator_that_others_cannot_reach_is_named(hosts):
    hosts.set_hosts(f"127.0.1.1 {NAMES[0]}\n", f"{ADDRESSES[0]} {NAMES[0]}\n")
    ended = workers(hosts, f"{NAMES[0]}:{PORT}", timeout_s=4)
    assert [code for code, _ in ended] == [1, 1]
    first, second = (re.sub(r"waited \d+ s", "waited N s", text) for _, text in ended)
    place = f"at {NAMES[0]}:{PORT}: process"
    assert (
        f"tx.initialize of process 0 of 2 {place} 1 did not come (here: 0 on {NAMES[0]}); only "
        f"this host's own processes can: its name {NAMES[0]} means 127.0.1.1 here, so give the "
        "coordinator as an address that the others can reach; waited N s of timeout_s=4"
    ) in first
    assert (
        f"tx.initialize of process 1 of 2 {place} 0 did not come: it does not answer at "
        f"{NAMES[0]}:{PORT} (Connection refused); waited N s of timeout_s=4"
    ) in second
