"""Joining processes: what is refused, what one process alone does, and two real ones over gloo."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import pytest

import txcore as tx
from txcore import launch

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(__file__).with_name("worker.py")
DEADLINE_S = 90
# 127.0.0.1 as /proc/net/tcp and tcp6 (there as ::ffff:127.0.0.1) write it, by host-order words.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
GOOD = {"coordinator": "127.0.0.1:12345", "num_processes": 2, "process_id": 0}


def says(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


@pytest.fixture(autouse=True)
def never_joins(monkeypatch):
    """Fail, rather than wait for others, should a call get past the checks."""

    def joined(**_):
        raise AssertionError("jax.distributed.initialize was called")

    monkeypatch.setattr(jax.distributed, "initialize", joined)


@pytest.mark.parametrize(
    "given, missing",
    [
        (["coordinator"], "num_processes, process_id"),
        (["num_processes"], "coordinator, process_id"),
        (["coordinator", "num_processes"], "process_id"),
        (["num_processes", "process_id"], "coordinator"),
    ],
)
def test_some_arguments_are_missing(given, missing):
    text = (
        "tx.initialize needs coordinator=, num_processes= and process_id= together (or none of "
        f"them, to detect the cluster), but {missing} is missing"
    )
    with says(ValueError, text):
        tx.initialize(**{name: GOOD[name] for name in given})


@pytest.mark.parametrize(
    "coordinator", ["", "host", ":12345", "host:", "host:http", "host:0", "host:65536", "host:-1"]
)
def test_bad_coordinator(coordinator):
    text = f"tx.initialize needs coordinator= 'host:port', got {coordinator!r}"
    with says(ValueError, text):
        tx.initialize(**GOOD | {"coordinator": coordinator})


@pytest.mark.parametrize("count", [0, -1])
def test_bad_number_of_processes(count):
    with says(ValueError, f"tx.initialize needs num_processes= at least 1, got {count}"):
        tx.initialize(**GOOD | {"num_processes": count})


@pytest.mark.parametrize("rank", [-1, 2])
def test_bad_process_id(rank):
    text = f"tx.initialize needs process_id= from 0 to 1 for num_processes=2, got {rank}"
    with says(ValueError, text):
        tx.initialize(**GOOD | {"process_id": rank})


@pytest.mark.parametrize("arguments", [GOOD, {}])
def test_after_a_backend_has_started(arguments):
    text = (
        "tx.initialize needs to come before jax touches a device (jax.devices(), any array), but "
        "a backend has started already: call it first"
    )
    with says(RuntimeError, text):
        tx.initialize(**arguments)


def test_alone_nobody_is_waited_for():
    started = time.monotonic()
    tx.barrier("alone", timeout_s=60)
    assert launch.share("alone", "its own", timeout_s=60) == "its own"
    assert time.monotonic() - started < 10


@pytest.fixture(scope="module")
def pair():
    """What two processes saw, and their coordinator's port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error", WORKER, f"127.0.0.1:{port}", str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    deadline = time.monotonic() + DEADLINE_S
    try:
        texts = [p.communicate(timeout=max(1, deadline - time.monotonic())) for p in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, (_, errors) in zip(ranks, texts, strict=True):
        assert process.returncode == 0, errors
    # gloo greets on stdout too: ours is the last line
    return [json.loads(out.splitlines()[-1]) for out, _ in texts], port


def test_two_processes_sum_over_both(pair):
    seen, _ = pair
    assert [s["sum"] for s in seen] == [[11.0], [11.0]]
    assert [s["size"] for s in seen] == [2, 2]


def test_two_processes_know_their_ranks(pair):
    seen, _ = pair
    assert [s["rank"] for s in seen] == [0, 1]
    assert [s["coordinates"] for s in seen] == [{"data": 0}, {"data": 1}]


def test_all_share_the_text_of_process_0(pair):
    seen, _ = pair
    assert [s["shared"] for s in seen] == ["from process 0"] * 2


def test_meeting_and_sharing_start_no_backend(pair):
    seen, _ = pair
    assert [s["backend_after_initialize"] for s in seen] == [False, False]
    assert [s["backend_after_share"] for s in seen] == [False, False]


def test_coordinator_listens_on_loopback_only(pair):
    (first, second), port = pair
    if first["listening_before_backend"] is None:
        pytest.skip("this system has no /proc/net")
    listens = [s for s in first["listening_with_backend"] if s.endswith(f":{port:04X}")]
    assert listens
    assert {s.partition(":")[0] for s in listens} <= LOOPBACK
    assert first["listening_before_backend"] == listens, "the coordinator listens elsewhere too"
    assert second["listening_before_backend"] == [], "only process 0 is the coordinator"
