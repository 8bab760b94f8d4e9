"""Joining processes: what is refused, what one process alone does, and real ones over gloo."""

import contextlib
import importlib
import os
import re
import socket
import time

import jax
import pytest
from joining import (
    DROPPED,
    place,
    refused,
    said,
    start,
)
from machine import within
from processes import finish, free_port, killed_at_the_end

import txcore as tx
from txcore import _compat, launch
from txcore.launch.join.rendezvous import NotTogether

# 127.0.0.1 as /proc/net/tcp and tcp6 (there as ::ffff:127.0.0.1) write it, by host-order words.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
joining_code = importlib.import_module("txcore.launch.join.initialize")  # a function has its name
TORCH = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "12345", "RANK": "0", "WORLD_SIZE": "2"}
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


@pytest.fixture
def alone(monkeypatch):
    for name in [n for n in os.environ if n.startswith(DROPPED)]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("started", [False, True])
def test_a_plain_process_is_a_run_of_one(started, alone, monkeypatch):
    """`tx.initialize()` in a script that is started by itself: nothing to join, nothing to say."""
    monkeypatch.setattr(_compat, "backend_started", lambda: started)
    for _ in range(2):
        tx.initialize()
    assert (launch.world_size(), launch.cluster()) == (1, None)


@pytest.mark.parametrize("given, taken", [(3, "3"), ((0, 2), "0,2")])
def test_a_plain_process_takes_the_gpus_named(given, taken, alone, monkeypatch):
    settings = {}
    monkeypatch.setattr(_compat, "backend_started", lambda: False)
    monkeypatch.setattr(_compat, "set_if_there", settings.__setitem__)
    tx.initialize(local_device_ids=given)
    assert settings == {"jax_cuda_visible_devices": taken, "jax_rocm_visible_devices": taken}
    monkeypatch.setattr(_compat, "backend_started", lambda: True)
    with pytest.raises(RuntimeError, match="a backend has started already: call it first"):
        tx.initialize(local_device_ids=given)


def test_a_plain_process_after_it_has_joined(alone, monkeypatch):
    monkeypatch.setattr(_compat, "coordination_client", lambda: object())
    with pytest.raises(RuntimeError, match="has joined its run already: leave the second call out"):
        tx.initialize()


@pytest.mark.parametrize("asked", [None, ("pod-0.jaxpods:55527", 4, 7)])
def test_what_only_jax_can_find_out(asked, monkeypatch):
    for name in [n for n in os.environ if n.startswith(DROPPED)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    monkeypatch.setattr(_compat, "backend_started", lambda: False)
    monkeypatch.setattr(_compat, "detect_cluster", lambda timeout_s: asked)
    text = (
        f"tx.initialize found Kubernetes, but jax {jax.__version__} does not find the "
        "coordinator's address, the number of processes and this one's id there, only (None, None, "
        "None): set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
    )
    if asked:
        text = "tx.initialize needs process_id= from 0 to 3 for num_processes=4, got 7"
    with says(ValueError, text):
        tx.initialize()


def test_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=nosuch0")
    monkeypatch.setattr(_compat, "backend_started", lambda: False)
    there = ", ".join(sorted(name for _, name in socket.if_nameindex()))
    text = (
        f"NCCL_SOCKET_IFNAME='=nosuch0' names no interface of this host, which has {there}: set it "
        "to one of these, on each rank to what its own host has, or leave it out"
    )
    with says(ValueError, text):
        tx.initialize(**GOOD)


@pytest.mark.parametrize("given", ["arguments", "variables"])
def test_after_a_backend_has_started(given, monkeypatch):
    for name, value in TORCH.items() if given == "variables" else ():
        monkeypatch.setenv(name, value)
    text = (
        "tx.initialize needs to come before jax touches a device (jax.devices(), any array), but "
        "a backend has started already: call it first"
    )
    with says(RuntimeError, text):
        tx.initialize(**(GOOD if given == "arguments" else {}))


def test_alone_nobody_is_waited_for():
    started = time.monotonic()
    tx.barrier("alone", timeout_s=60)
    assert launch.share("alone", "its own", timeout_s=60) == "its own"
    assert within(time.monotonic() - started, 10)


@pytest.fixture(scope="module")
def pair():
    """What two processes said, and their coordinator's port; proxies are in the way."""
    port = free_port()
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:9")
    # Process 0 is late, and ends while process 1 goes on.
    second = start(place(port, 2, 1, linger=2), **proxies)
    time.sleep(2)
    first = start(place(port, 2, 0), **proxies)
    return [said(ended) for ended in finish(first, second)], port


def test_two_processes_sum_over_both(pair):
    seen, _ = pair
    assert [s["sum"] for s in seen] == [[11.0], [11.0]]
    assert [s["size"] for s in seen] == [2, 2]


def test_two_processes_know_their_ranks(pair):
    seen, _ = pair
    assert [s["position"] for s in seen] == [0, 1]
    assert [s["coordinates"] for s in seen] == [{"data": 0}, {"data": 1}]


def test_all_share_the_text_of_process_0(pair):
    seen, _ = pair
    assert [s["shared"] for s in seen] == ["from process 0"] * 2


def test_meeting_and_sharing_start_no_backend(pair):
    seen, _ = pair
    assert [s["backend_after_initialize"] for s in seen] == [False, False]
    assert [s["backend_after_share"] for s in seen] == [False, False]


def test_jax_leaves_sigterm_to_the_handler_that_is_there(pair):
    seen, _ = pair
    assert [s["heard_sigterm"] for s in seen] == [True, True]


def test_a_process_joins_at_once_when_the_other_is_there(pair):
    (first, second), _ = pair
    assert first["joined_in_s"] < 20  # the other one tries at least every 2 s
    assert second["joined_in_s"] < 60


def test_everything_listens_on_loopback_only(pair):
    (first, second), port = pair
    if first["listening_before_backend"] is None:
        pytest.skip("this system has no /proc/net")
    coordinator = [s for s in first["listening_with_backend"] if s.endswith(f":{port:04X}")]
    assert coordinator
    assert first["listening_before_backend"] == coordinator
    assert second["listening_before_backend"] == [], "only process 0 is the coordinator"
    everything = first["listening_with_backend"] + second["listening_with_backend"]
    assert len(everything) > len(coordinator), "gloo listens too"
    assert {s.partition(":")[0] for s in everything} <= LOOPBACK


def test_an_address_is_listened_on_only_when_told_so():
    port = free_port()
    environment = {"JAX_COORDINATOR_BIND_ADDRESS": f"[::]:{port}"}
    first, second = (
        said(e) for e in finish(*(start(place(port, 2, r), **environment) for r in (0, 1)))
    )
    if first["listening_before_backend"] is None:
        pytest.skip("this system has no /proc/net")
    assert {*first["listening_before_backend"]} == {f"{'0' * 32}:{port:04X}"}
    assert first["sum"] == second["sum"] == [11.0]


@pytest.mark.parametrize("by", ["torchrun", "hand"])
def test_two_processes_join_by_torchruns_variables(by):
    """torchrun's own store listens at MASTER_PORT: the coordinator goes elsewhere by itself."""
    with contextlib.ExitStack() as held:
        store = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        common = {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2", "MASTER_PORT": f"{free_port()}"}
        if by == "torchrun":
            common |= {"MASTER_PORT": f"{store.getsockname()[1]}", "LOCAL_WORLD_SIZE": "2"}
            common |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
            common |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        ranks = ({"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in (0, 1))
        seen = [said(e) for e in finish(*(start({}, **common, **own) for own in ranks))]
    assert [(s["position"], s["size"], s["sum"]) for s in seen] == [(0, 2, [11.0]), (1, 2, [11.0])]


def test_a_process_that_does_not_come_is_named_by_all():
    port = free_port()
    # The last one gives up before process 0 does: it knows too who is missing.
    waits = {0: 15, 1: 60, 2: 5}
    ended = finish(*(start(place(port, 4, rank, timeout_s=s)) for rank, s in waits.items()))
    own, told, early = (refused(each) for each in ended)
    host = socket.gethostname()
    missing = (
        "process 3 did not come and process 2 came and ended again "
        f"(here: 0 on {host}, 1 on {host})"
    )
    for rank, text in enumerate((own, told)):
        assert re.fullmatch(
            rf"RuntimeError: tx\.initialize of process {rank} of 4 at 127\.0\.0\.1:{port}: "
            rf"{re.escape(missing)}; waited \d+ s of timeout_s={waits[rank]}",
            text,
        ), text
    assert "process 3 did not come; waited" in early


def test_process_0_that_does_not_come_is_named():
    port = free_port()
    (ended,) = finish(start(place(port, 2, 1, timeout_s=3)))
    assert re.fullmatch(
        rf"RuntimeError: tx\.initialize of process 1 of 2 at 127\.0\.0\.1:{port}: process 0 did "
        rf"not come: it does not answer at 127\.0\.0\.1:{port} \(Connection refused\); waited "
        r"\d+ s of timeout_s=3",
        refused(ended),
    )


def test_the_coordinator_of_another_run_is_not_shared():
    """By itself jax's server would share the port, and each run would get some of the ranks."""
    port = free_port()
    with killed_at_the_end(start(place(port, 1, 0, linger=60))) as (other,):
        other.stdout.readline()
        (ended,) = finish(start(place(port, 1, 0, timeout_s=1)))
    assert refused(ended).startswith(
        f"RuntimeError: tx.initialize of process 0 of 1 at 127.0.0.1:{port}: process 0 needs to "
        f"listen on 127.0.0.1:{port}, but cannot (Address already in use; process_id=0 is taken by "
        f"a process on {socket.gethostname()}, and "
    )


def test_an_address_to_listen_at_that_is_none(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "0.0.0.0")
    with says(
        ValueError, "tx.initialize needs JAX_COORDINATOR_BIND_ADDRESS 'host:port', got '0.0.0.0'"
    ):
        joining_code._meet_others("127.0.0.1:12345", 2, 0, time.monotonic())


def test_a_name_that_cannot_be_one():
    started = time.monotonic()
    with pytest.raises(
        NotTogether, match=r"^process 0 cannot find its own address: a\.\.b is unknown \(.*label"
    ):
        joining_code._meet_others("a..b:12345", 2, 0, time.monotonic() + 60)
    assert within(time.monotonic() - started, 30)
    with pytest.raises(NotTogether, match=r"^process 0 did not come: it does not answer at a\.\.b"):
        joining_code._meet_others("a..b:12345", 2, 1, time.monotonic() + 0.2)


def test_process_0_that_fails_does_not_wait_for_the_others():
    port = free_port()
    first = start(place(port, 2, 0, fail="on purpose"))
    with killed_at_the_end(start(place(port, 2, 1, stay_until="/nowhere"))):
        (ended,) = finish(first)
    assert refused(ended) == "ValueError: on purpose"


@pytest.mark.parametrize("name", ["timeout_s", "heartbeat_timeout_s"])
@pytest.mark.parametrize("seconds", [0, -1.5, float("nan"), float("inf")])
def test_bad_timeout(name, seconds):
    with says(ValueError, f"tx.initialize needs {name}= above 0 seconds, got {seconds}"):
        tx.initialize(**GOOD | {name: seconds})


def test_called_twice(monkeypatch):
    monkeypatch.setattr(_compat, "coordination_client", lambda: object())
    text = (
        "tx.initialize needs to be called once, but this process has joined its run already: leave "
        "the second call out"
    )
    with says(RuntimeError, text):
        tx.initialize(**GOOD)
