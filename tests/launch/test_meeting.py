"""How processes meet before jax joins them: as threads here, since only sockets are needed."""

import concurrent.futures
import contextlib
import errno
import json
import os
import re
import selectors
import socket
import sys
import time

import pytest
from machine import within
from processes import free_port

from txcore.launch.join import gathering as gathering_code
from txcore.launch.join import rendezvous
from txcore.launch.join.gathering import Host
from txcore.launch.join.rendezvous import (
    NotTogether,
    join_meeting,
    listen_alone,
    make_greeting,
    tell_of_end,
)


def says(text):
    return pytest.raises(NotTogether, match=f"^{re.escape(text)}$")


@contextlib.contextmanager
def gathering(size, seconds=20.0, run=None):
    """A process 0 that gathers; yields its address and its future."""
    deadline = time.monotonic() + seconds
    address = f"127.0.0.1:{free_port()}"
    host = Host(listen_alone(address, deadline), size, "first", run)
    with concurrent.futures.ThreadPoolExecutor() as pool, contextlib.closing(host):
        yield address, pool.submit(host.gather_all, deadline), pool


def join(pool, address, rank, size, seconds=20.0, run=None):
    """Attend in a thread; the future's result is None where all have met, and is let go of."""

    def attend_once():
        join_meeting(address, rank, size, time.monotonic() + seconds, run).connection.close()

    return pool.submit(attend_once)


def greet(address, **greeting):
    """Connect by hand and say something; return the connection."""
    connection = socket.create_connection(address.split(":"), timeout=10)
    connection.sendall(json.dumps(greeting).encode() + b"\n")
    return connection


def answers(connection):
    """Return all that process 0 says until it hangs up."""
    with connection, connection.makefile() as lines:
        return [json.loads(line) for line in lines]


def test_all_meet():
    with gathering(4) as (address, first, pool):
        others = [join(pool, address, rank, 4) for rank in (3, 1)]
        time.sleep(0.3)
        assert not any(each.done() for each in (first, *others))
        others.append(join(pool, address, 2, 4))
        assert [each.result() for each in (first, *others)] == [None] * 4


def test_jaxs_server_gets_the_port_when_they_have_met_and_no_other_run_does(monkeypatch):
    monkeypatch.setattr(rendezvous, "ATTEMPTS", 1)
    with gathering(2) as (address, first, pool):
        other = join(pool, address, 1, 2)
        first.result()
        other.result()
        if sys.platform == "linux":
            with says(cannot(address, os.strerror(errno.EADDRINUSE))):
                listen_alone(address, time.monotonic())
        with socket.socket() as shares:  # as gRPC's does
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                shares.setsockopt(socket.SOL_SOCKET, option, 1)
            shares.bind(("127.0.0.1", int(address.split(":")[1])))
            shares.listen()
    listen_alone(address, time.monotonic()).close()


def test_one_process_meets_nobody():
    with gathering(1) as (_, first, _):
        first.result()


def test_process_0_may_come_last():
    address = f"127.0.0.1:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        other = join(pool, address, 1, 2)
        time.sleep(0.5)
        deadline = time.monotonic() + 20
        with contextlib.closing(Host(listen_alone(address, deadline), 2, "first")) as host:
            host.gather_all(deadline)
            other.result()


def test_who_came_and_went_may_come_again():
    with gathering(3) as (address, first, pool):
        greet(address, rank=1, size=3, host="second").close()
        time.sleep(0.2)
        others = [join(pool, address, rank, 3) for rank in (1, 2)]
        assert [each.result() for each in (first, *others)] == [None] * 3


def test_strangers_are_not_heard_and_hold_nobody_up():
    strangers = []
    with gathering(2) as (address, first, pool):
        for number in range(40):
            stranger = socket.create_connection(address.split(":"))
            stranger.sendall(os.urandom(number))  # the first says nothing at all
            strangers.append(stranger)
        words = (
            b"GET / HTTP/1.1\r\n\r\n",
            b"[]\n",
            b"{}\n",
            b'{"rank": "1"}\n',
            b"[" * 9999 + b"\n",
        )
        for said in (*words, b"x" * 2**17):
            stranger = socket.create_connection(address.split(":"))
            with contextlib.suppress(OSError):
                stranger.sendall(said)
            strangers.append(stranger)
        other = join(pool, address, 1, 2)
        first.result()
        other.result()
    for stranger in strangers:
        stranger.close()


def test_many_strangers_do_not_use_up_all_connections(monkeypatch):
    monkeypatch.setattr(gathering_code, "_STRANGERS", 8)
    with gathering(2) as (address, first, pool):
        strangers = [socket.create_connection(address.split(":")) for _ in range(50)]
        other = join(pool, address, 1, 2)
        first.result()
        other.result()
        strangers[0].settimeout(5)
        assert strangers[0].recv(1) == b""  # the oldest was hung up on
    for stranger in strangers:
        stranger.close()


def test_a_stranger_that_speaks_while_it_is_dropped():
    """One select may say that there is a newcomer, and that the one dropped for it has spoken."""
    host = Host(listen_alone(f"127.0.0.1:{free_port()}", 0.0), 2, "first")
    stranger, other_end = socket.socketpair()
    with host._listener, other_end, selectors.DefaultSelector() as selector:
        selector.register(stranger, selectors.EVENT_READ)
        other_end.sendall(b"?")
        host._drop_connection(stranger, selector)
        host._read_connection(stranger, selector)
    assert host.missing_ranks() == [1]


def test_what_a_stranger_says_does_nothing_to_a_terminal():
    with gathering(3, seconds=3.0) as (address, first, _):
        assert answers(greet(address, rank=True, size=3, host="odd")) == []
        escaped = greet(address, rank=1, size=3, host="\x1b[2Jevil\n" + 100 * "x")
        shown = "?[2Jevil?" + 55 * "x"
        with says(f"process 2 did not come (here: 0 on first, 1 on {shown})"):
            first.result()
        escaped.close()


def of(run):
    return "a run without an id" if run is None else f"run {run}"


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("ours, theirs", [("a", "b"), (None, "b"), ("a", None)])
def test_another_run_at_the_port_is_refused_in_seconds(ours, theirs, size, monkeypatch):
    """Its processes of every number; the run that has the port is not disturbed."""
    monkeypatch.setattr(rendezvous, "PATIENCE_S", 1.0)
    here = socket.gethostname()
    reason = (
        f"the port is that of {of(ours)} (process 0 on first), and process {{}} (on {here}) is of "
        f"{of(theirs)}: give each run a port of its own, and all processes of a run the same "
        "TXCORE_RUN or none"
    )
    with gathering(size, run=ours) as (address, first, pool):
        begun = time.monotonic()
        foreign = [join(pool, address, rank, size, run=theirs) for rank in range(1, size)]
        for rank, other in enumerate(foreign, 1):
            with says(reason.format(rank)):
                other.result()
        monkeypatch.setattr(rendezvous, "ATTEMPTS", 1)
        taken = f"{os.strerror(errno.EADDRINUSE)}; {reason.format(0)}"
        with says(cannot(address, taken)):
            listen_alone(address, time.monotonic() + 20, make_greeting(0, size, theirs))
        assert within(time.monotonic() - begun, 10)
        assert not first.done()
        others = [join(pool, address, rank, size, run=ours) for rank in range(1, size)]
        assert [each.result() for each in (first, *others)] == [None] * size


def test_who_is_refused_by_a_run_that_then_ends_is_waited_for():
    address = f"127.0.0.1:{free_port()}"
    with (
        contextlib.closing(Host(listen_alone(address, 0.0), 2, "first", "a")) as ends,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        gathered = pool.submit(ends.gather_all, time.monotonic() + 0.7)
        other = join(pool, address, 1, 2, run="b")
        with pytest.raises(NotTogether):
            gathered.result()
        deadline = time.monotonic() + 20
        with contextlib.closing(Host(listen_alone(address, deadline), 2, "next", "b")) as host:
            host.gather_all(deadline)
            other.result()


CONFLICTS = {
    "count": (1, 4, "process 1 (on third) was started with num_processes=4, but process 0 (on "
              "first) with 3: give all the same"),
    "taken": (1, 3, "process_id=1 is taken by a process on second, and another on third has it "
              "too: give each its own, from 0 to 2"),
    "taken 0": (0, 3, "process_id=0 is taken by a process on first, and another on third has it "
                "too: give each its own, from 0 to 2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFLICTS)
def test_ranks_of_one_run_that_contradict_each_other_end_all_at_once(kind):
    rank, size, text = CONFLICTS[kind]
    begun = time.monotonic()
    with gathering(3, seconds=60, run="a") as (address, first, _):
        second = greet(address, rank=1, size=3, host="second", run="a")
        time.sleep(0.2)
        third = answers(greet(address, rank=rank, size=size, host="third", run="a"))
        assert third == [{"error": text, "again": False}]
        with says(text):
            first.result()
        *_, last = answers(second)
        assert last == {"error": text}
    assert within(time.monotonic() - begun, 10)


@pytest.mark.parametrize("kind", CONFLICTS)
def test_where_a_run_has_no_id_a_contradiction_bounds_the_wait(kind, monkeypatch):
    """It may be of another run: the missing ones have some time left to come."""
    monkeypatch.setattr(gathering_code, "DOUBT_S", 2.0)
    rank, size, text = CONFLICTS[kind]
    text += ", and each run a port of its own" if kind.startswith("taken") else ""
    with gathering(3, seconds=60) as (address, first, pool):
        second = greet(address, rank=1, size=3, host="second")
        time.sleep(0.2)
        assert answers(greet(address, rank=rank, size=size, host="third")) == [
            {"error": text, "again": False}
        ]
        missing = (
            "process 2 did not come (here: 0 on first, 1 on second); refused was one that may be "
            f"it: {text}"
        )
        with says(missing):
            first.result()
        *_, last = answers(second)
        assert last == {"error": missing}
    with gathering(3, seconds=60) as (address, first, pool):
        other = join(pool, address, 1, 3)
        time.sleep(0.2)
        answers(greet(address, rank=rank, size=size, host="third"))
        time.sleep(0.5)
        late = join(pool, address, 2, 3)
        assert [each.result() for each in (first, other, late)] == [None] * 3


def test_a_rank_whose_connection_broke_takes_its_own_place():
    with gathering(3, run="a") as (address, first, pool):
        greeting = make_greeting(1, 3, "a")
        with greet(address, **greeting), greet(address, **greeting) as again:
            time.sleep(0.2)
            join(pool, address, 2, 3, run="a").result()
            first.result()
            with again.makefile() as lines:
                assert any('"missing": []' in line for line in lines)


@pytest.mark.parametrize(
    "code, how", [(0, "ended with exit code 0"), (-9, "was killed by SIGKILL")]
)
def test_a_rank_of_which_the_launcher_says_that_it_has_ended(code, how):
    text = (
        f"process 2 {how} before all had met: see what it says, and have every process call "
        "tx.initialize"
    )
    with gathering(3, seconds=60, run="a") as (address, first, pool):
        other = join(pool, address, 1, 3, run="a")
        time.sleep(0.2)
        assert not tell_of_end(address, "b", 2, code), "of another run"
        assert tell_of_end(address, "a", 2, code)
        for each in (first, other):
            with says(text):
                each.result()
    assert not tell_of_end(address, "a", 2, code), "nobody is there"


def test_a_run_without_an_id_hears_of_no_end():
    with gathering(2, seconds=1.0) as (address, first, _):
        assert not tell_of_end(address, None, 1, 0)
        with says("process 1 did not come (here: 0 on first)"):
            first.result()


def test_process_0_that_ends_when_all_have_met_is_not_waited_for():
    address = f"127.0.0.1:{free_port()}"
    deadline = time.monotonic() + 20
    with concurrent.futures.ThreadPoolExecutor() as pool:
        host = Host(listen_alone(address, deadline), 2, "first")
        seat = pool.submit(join_meeting, address, 1, 2, deadline)
        host.gather_all(deadline)
        host.close()
        with seat.result().connection, socket.create_server(("127.0.0.1", 0)) as another:
            there = f"127.0.0.1:{another.getsockname()[1]}"
            with says("process 0 ended after all had met: see what it says"):
                rendezvous.wait_until_served(there, deadline, seat.result())


def test_who_waits_hears_who_is_missing():
    with gathering(20, seconds=6.0) as (address, first, pool):
        many = ", ".join(map(str, range(2, 18)))
        with says(f"processes {many} and 2 more did not come"):
            join(pool, address, 1, 20, seconds=0.5).result()
        with says(
            f"processes {many} and 2 more did not come and process 1 came and ended again "
            "(here: 0 on first)"
        ):
            first.result()


def test_process_0_that_ends_while_others_wait():
    address = f"127.0.0.1:{free_port()}"
    listener = listen_alone(address, time.monotonic())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        other = join(pool, address, 1, 3, seconds=2)
        connection, _ = listener.accept()
        connection.sendall(b'{"missing": [2]}\n')
        listener.close()
        time.sleep(0.2)
        connection.close()
        with says(f"process 0 did not come: it does not answer at {address} (Connection refused)"):
            other.result()


@pytest.mark.parametrize(
    "word", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\x00\x18\x04\n", b"z" * 2**17]
)
def test_another_server_is_not_taken_for_process_0(word):
    address = f"127.0.0.1:{free_port()}"
    with (
        listen_alone(address, time.monotonic()) as listener,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        listener.settimeout(30)
        other = join(pool, address, 1, 2, seconds=2)
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(word)
        reason = "who answers there waits for no process of this run"
        text = f"process 0 did not come: it does not answer at {address} ({reason})"
        with says(text):
            other.result()


def cannot(address, reason):
    return (
        f"process 0 needs to listen on {address}, but cannot ({reason}): end what listens there (a "
        "second process 0? another run?), or take another port (JAX_COORDINATOR_PORT, "
        "coordinator=, or --coordinator of txcore launch); if it is not an address of this host, "
        "start process 0 on the coordinator's host, or set JAX_COORDINATOR_BIND_ADDRESS"
    )


def test_a_port_that_becomes_free_in_time():
    address = f"127.0.0.1:{free_port()}"
    taken = listen_alone(address, time.monotonic())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        listener = pool.submit(listen_alone, address, time.monotonic() + 20)
        time.sleep(0.3)
        taken.close()
        listener.result().close()


def test_there_are_three_attempts_to_listen(monkeypatch):
    pauses = []
    monkeypatch.setattr(rendezvous.time, "sleep", pauses.append)
    address = f"127.0.0.1:{free_port()}"
    with listen_alone(address, 0.0), says(cannot(address, os.strerror(errno.EADDRINUSE))):
        listen_alone(address, time.monotonic() + 60)
    assert pauses == [1, 2]


def test_an_address_of_another_host():
    text = cannot("203.0.113.1:12345", os.strerror(errno.EADDRNOTAVAIL))
    with says(text):
        listen_alone("203.0.113.1:12345", 0.0)


def test_ipv6():
    try:
        listener = listen_alone(f"[::1]:{free_port()}", 0.0)
    except NotTogether:
        pytest.skip("this host has no IPv6")
    address = f"[::1]:{listener.getsockname()[1]}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        other = join(pool, address, 1, 2)
        with contextlib.closing(Host(listener, 2, "first")) as host:
            host.gather_all(time.monotonic() + 20)
            other.result()
