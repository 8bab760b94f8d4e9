"""`txcore launch` with real ranks: jax over gloo, on this host and on two in network namespaces."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from launched_cases import (
    REPORT,
    collect_reports,
    is_running,
    launch,
    start_launcher,
    wait_for_end,
    wait_for_pids,
    write_script,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tested on Linux")
PSUM = REPORT.with_name("launched_psum.py")


def sums(text):
    """Return the lines of the script; gloo greets on stdout too."""
    return sorted(line for line in text.splitlines() if re.match(r"\[\d+\] \d \d \[", line))


def test_two_ranks_of_two_devices_sum_over_all():
    done = launch("-n", 2, "--devices-per-process", 2, PSUM)
    assert done.returncode == 0, done.stderr
    assert sums(done.stdout) == ["[0] 0 2 [22.0]", "[1] 1 2 [22.0]"]


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, pytest.param(1, marks=pytest.mark.extra), 2])
def test_the_rank_that_fails_is_named_not_those_that_the_watch_ends(culprit, tmp_path):
    raises = write_script(
        tmp_path,
        f"""
        import txcore as tx
        tx.initialize()
        tx.barrier("all are here")
        if os.environ["JAX_PROCESS_ID"] == "{culprit}":
            raise ValueError("batch 7 is damaged")
        time.sleep(60)
        """,
    )
    done = launch("-n", 3, raises)
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(rf"txcore: rank {culprit} \(pid \d+\) ended with exit code 1", last), (
        done.stderr
    )
    assert done.returncode == 1
    assert f"[{culprit}] ValueError: batch 7 is damaged" in done.stderr.splitlines()


def ip(line):
    subprocess.run(["ip", *line.split()], check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture
def namespaces():
    """Make two hosts that reach each other alone; return the launcher's options for them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and `ip`")
    names = [f"txcore-{os.getpid()}-{letter}" for letter in "ab"]
    try:
        ip(f"netns add {names[0]}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    folders = [pathlib.Path("/etc/netns") / name for name in names]
    try:
        ip(f"netns add {names[1]}")
        ip(f"-n {names[0]} link add veth0 type veth peer name veth0 netns {names[1]}")
        for number, (name, folder) in enumerate(zip(names, folders, strict=True), start=1):
            ip(f"-n {name} addr add 10.77.0.{number}/24 dev veth0")
            ip(f"-n {name} link set veth0 up")
            ip(f"-n {name} link set lo up")
            # gloo tells the others the address that the host's own name has.
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"10.77.0.{number} {socket.gethostname()}\n")
        where = ["--remote-shell", "ip netns exec", "--coordinator", "10.77.0.1:23456"]
        yield ["--hosts", ",".join(names), *where]
    finally:
        for name, folder in zip(names, folders, strict=True):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)
            shutil.rmtree(folder, ignore_errors=True)


def test_two_hosts_sum_over_both(namespaces):
    done = launch("-n", 2, *namespaces, PSUM)
    assert done.returncode == 0, done.stderr
    assert sums(done.stdout) == ["[0] 0 1 [11.0]", "[1] 1 1 [11.0]"]


def test_ranks_are_on_their_hosts(namespaces, tmp_path):
    where = write_script(tmp_path, "print(os.readlink('/proc/self/ns/net'))")
    done = launch("-n", 4, *namespaces, where)
    first, second, third, fourth = (line.split()[1] for line in sorted(done.stdout.splitlines()))
    assert first == second != third == fourth
    assert os.readlink("/proc/self/ns/net") not in (first, third)
    found = collect_reports("-n", 2, *namespaces, REPORT)
    assert {r["env"]["JAX_COORDINATOR_BIND_ADDRESS"] for r in found} == {"10.77.0.1:23456"}


@pytest.mark.parametrize("killed", ["a rank", "the launcher"])
def test_a_kill_leaves_nothing_on_two_hosts(namespaces, tmp_path, killed):
    idle = write_script(
        tmp_path,
        """
        rank = os.environ["JAX_PROCESS_ID"]
        open(f"{sys.argv[1]}/pid-{rank}", "w").write(f"{os.getpid()}\\n")
        time.sleep(60)
        """,
    )
    with start_launcher("-n", 2, *namespaces, idle, tmp_path) as launcher:
        pids = wait_for_pids(tmp_path, 2)
        os.kill(pids[1] if killed == "a rank" else launcher.pid, signal.SIGKILL)
        wait_for_end(pids)
        if killed == "a rank":
            _, err = launcher.communicate(timeout=30)
            name = namespaces[1].split(",")[1]
            assert err == f"txcore: rank 1 (on {name}) was killed by SIGKILL\n"
            assert launcher.returncode == 137
    assert not any(map(is_running, pids))
