"""How a rank leaves a watched run: by an error, a verdict, or the end of its program."""

import subprocess
import sys
import threading
import time

import jax
import pytest
from machine import within

from txcore import _compat
from txcore.launch.preflight import MismatchError
from txcore.launch.watch import shutdown
from txcore.launch.watch.status import Phase, Verdict
from txcore.launch.watch.watcher import Watcher

GLOO = "Gloo all-reduce failed: [external/gloo/pair.cc:1] Connection closed by peer [127.0.0.1]"


def run_exchanges(ranks, until=lambda: False):
    """Exchange on threads of their own until told to end."""

    def run(rank):
        while not rank.closed and not until():
            rank.exchange_entries()
            time.sleep(0.01)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    return threads


@pytest.fixture
def real(coordinator, monkeypatch):
    """Three ranks on the real clock, whose jax is not shut down."""
    monkeypatch.setattr(_compat, "coordination_client", lambda: coordinator)
    shut = []
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: shut.append(1))
    ranks = [Watcher(coordinator, rank, 3) for rank in range(3)]
    ranks[0].shut = shut
    yield ranks
    for rank in ranks:
        rank.closed = True


def test_a_rank_tells_its_error_and_disconnects(real):
    run_exchanges(real)
    shutdown.report_failure(real[1], ValueError("batch 7\nis damaged"))
    entry = real[1].sent
    assert (entry.failed, entry.ended) == ("ValueError: batch 7 is damaged", True)
    assert real[0].shut == [1]
    assert real[1].closed


@pytest.mark.parametrize(
    "leave", [shutdown.leave_run, lambda rank: shutdown.report_failure(rank, ValueError("no"))]
)
def test_nothing_is_asked_of_the_coordinator_once_a_rank_disconnects(
    leave, real, coordinator, monkeypatch
):
    # Rank 0 goes then: who still waits for its answer comes back into a Python that has ended.
    monkeypatch.setattr(_compat, "coordinator_address", lambda: "127.0.0.1:1")
    answer, asking = coordinator.key_value_dir_get, []

    def slow(folder):
        asking.append(1)
        time.sleep(0.3)
        found = answer(folder)
        asking.pop()
        return found

    monkeypatch.setattr(coordinator, "key_value_dir_get", slow)
    found = []
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: found.append(list(asking)))
    real[1].start_threads(lambda watcher, verdict: found.append(verdict))
    leave(real[1])
    assert found == [[]]
    assert real[1].sent.ended
    calls = coordinator.calls
    time.sleep(0.2)
    assert coordinator.calls == calls


def test_the_coordinator_fails_last(real, monkeypatch):
    run_exchanges(real)
    monkeypatch.setattr(shutdown, "GRACE_S", 60)
    gone = threading.Timer(0.3, lambda: [rank.tell_others(ended=True) for rank in real[1:]])
    gone.start()
    shutdown.report_failure(real[0], ValueError("no"))
    assert real[1].sent.ended
    assert real[2].sent.ended
    assert real[0].shut == []
    assert not real[0].closed  # its program goes on to its end


def test_the_coordinator_does_not_wait_for_a_rank_that_was_killed_after_its_end(
    real, coordinator, monkeypatch
):
    """To jax it is connected for minutes, and so the last call of rank 0 does not return."""
    monkeypatch.setattr(_compat, "coordinator_address", lambda: None)
    down = threading.Event()
    coordinator.get_live_nodes = lambda nodes: down.wait()
    monkeypatch.setattr(jax.distributed, "shutdown", down.set)
    run_exchanges(real[1:])
    for rank in real[1:]:
        rank.tell_others(ended=True)
    real[0].peer_timeout_s = 0.5
    real[0].start_threads(lambda watcher, verdict: None)
    shutdown.leave_run(real[0])
    assert down.is_set()
    assert not any(thread.is_alive() for thread in real[0]._threads)


@pytest.mark.parametrize("code", [70, 75])
def test_a_rank_that_ended_keeps_its_own_exit_code_where_others_failed(ranks, code):
    ranks[0].verdict = Verdict("rank 2 is the cause", code)
    assert ranks[0].find_verdict(0.0, False) == ranks[0].verdict
    ranks[0].tell_others(ended=True)
    assert ranks[0].find_verdict(0.0, False) == (None if code == 70 else ranks[0].verdict)


def test_a_rank_that_ended_stays_until_a_verdict_has_ended_the_others(real):
    run_exchanges(real[:2])
    real[0].verdict = Verdict("rank 2 failed", 70)
    threading.Timer(0.3, lambda: real[1].tell_others(ended=True)).start()
    shutdown.leave_run(real[0])  # rank 2 is silent
    assert real[1].sent.ended
    assert real[0].shut == []


def test_the_table_is_not_changed_while_others_read_it(ranks):
    before = ranks[0].table
    ranks[0].exchange_entries()
    assert before == {}
    assert ranks[0].table.keys() == {0}


def test_many_ranks_do_not_hurry():
    assert Watcher(world=1000)._hurry_s == 4.0


def test_an_error_that_all_ranks_raise_is_not_told(real):
    shutdown.report_failure(real[1], MismatchError("different"))
    assert real[1].to_tell.failed == ""


def test_only_the_first_error_is_told(real):
    run_exchanges(real)
    shutdown.report_failure(real[1], ValueError("first"))
    shutdown.report_failure(real[1], ValueError("second"))
    assert real[1].to_tell.failed == "ValueError: first"


def test_nobody_is_told_in_a_fork_or_alone(real):
    real[1]._pid += 1
    shutdown.report_failure(real[1], ValueError("no"))
    shutdown.leave_run(real[1])
    assert real[1].to_tell.failed == ""
    shutdown.report_failure(Watcher(), ValueError("no"))
    shutdown.leave_run(Watcher())


def test_a_coordinator_that_does_not_answer_does_not_hold_an_error_back(coordinator):
    rank = Watcher(coordinator, 1, 2, peer_timeout_s=0.5)
    started = time.monotonic()
    shutdown.report_failure(rank, ValueError("no"))
    assert within(time.monotonic() - started, 30)


def test_a_lost_connection_is_told_as_such_and_then_as_a_failure(coordinator, monkeypatch):
    rank = Watcher(coordinator, 0, 2, peer_timeout_s=0.2)
    monkeypatch.setattr(shutdown, "AT_MOST_S", 0.1)
    seen = []

    def closed():
        seen.append(rank.to_tell.lost)
        return rank.closed

    run_exchanges([rank], until=closed)
    shutdown.report_failure(rank, ValueError(GLOO))
    rank.closed = True
    assert f"ValueError: {GLOO}" in seen
    assert rank.to_tell.failed == f"ValueError: {GLOO}"


@pytest.mark.parametrize(
    "error, lost",
    [
        (ValueError(GLOO), True),
        (RuntimeError("FAILED_PRECONDITION: Buffer Definition Event: " + GLOO), True),
        (RuntimeError("INTERNAL: NCCL operation ncclAllReduce(...) failed: remote error"), True),
        (RuntimeError("UNAVAILABLE: Socket closed"), True),
        (RuntimeError("Timed out waiting 5000ms for recv operation to complete"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("unknown class 'igloo'"), False),
        (RuntimeError("timed out waiting for a batch"), False),
        (ValueError("batch 7 is damaged"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # of the program's own
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_that_speak_of_a_lost_peer(error, lost):
    assert shutdown.speaks_of_a_lost_peer(error) is lost


def test_long_errors_are_cut():
    text = shutdown.describe_error(ValueError("x" * 5000))
    assert text == f"ValueError: {'x' * (shutdown.LONGEST_ERROR - 15)}..."


def test_last_words(real, capfd, monkeypatch):
    monkeypatch.setattr(shutdown, "_end_anyway", lambda code: None)
    run_exchanges(real)
    real[1].position = (Phase.STEP, 120, "train_step, whose last collective is psum/grads (a.py:1)")
    try:
        raise ValueError(GLOO)
    except ValueError as error:
        real[1].error = error
    real[1]._stood_still = (25.0, time.monotonic())
    codes = []
    shutdown.end_process(real[1], Verdict("rank 2 is lost"), codes.append)
    assert codes == [75]
    assert real[1].sent.ended
    text = capfd.readouterr().err
    assert text.startswith(
        "txcore: rank 1 ends at step 120 (step): rank 2 is lost (this rank itself had stood still "
        "for 25 s)\n"
        "txcore: rank 1 was in train_step, whose last collective is psum/grads (a.py:1)\n"
        "Traceback (most recent call last):\n"
    )
    assert f"ValueError: {GLOO}\n" in text
    assert f'  File "{__file__}", line ' in text.partition("Thread MainThread")[2]
    assert "txcore-" not in text


def test_the_coordinator_ends_after_those_that_live(real, clock, monkeypatch):
    monkeypatch.setattr(shutdown, "_end_anyway", lambda code: None)
    run_exchanges(real[:2])  # rank 2 is dead
    deadline = time.monotonic() + 10
    while 2 not in real[0].silent_ranks():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    threading.Timer(0.4, lambda: real[1].tell_others(ended=True)).start()
    monkeypatch.setattr(shutdown, "GRACE_S", 60)
    monkeypatch.setattr(shutdown.time, "sleep", lambda seconds, sleep=time.sleep: sleep(0.01))
    codes = []
    shutdown.end_process(real[0], Verdict("rank 2 is lost"), codes.append)
    assert codes == [75]
    assert real[1].sent.ended


def test_nobody_waits_for_a_dead_coordinator(real, monkeypatch):
    monkeypatch.setattr(shutdown, "_end_anyway", lambda code: None)
    real[1].coordinator_lost = True

    def left(code):
        raise SystemExit(code)

    monkeypatch.setattr(shutdown, "wait_until", lambda *_: pytest.fail("it waits"))
    with pytest.raises(SystemExit):
        shutdown.end_process(real[1], Verdict("rank 0 is gone"), left)


def test_a_blocked_stderr_does_not_keep_a_rank(tmp_path):
    """The pipe that nobody reads is full: the process ends all the same."""
    script = (
        "import os, fcntl; from txcore.launch.watch import shutdown; shutdown.AT_MOST_S = 0.5\n"
        "from txcore.launch.watch.status import Verdict\n"
        "from txcore.launch.watch.watcher import Watcher\n"
        "r, w = os.pipe(); os.set_blocking(w, False)\n"
        "try:\n    while True: os.write(w, bytes(65536))\n"
        "except BlockingIOError: pass\n"
        "os.set_blocking(w, True); os.dup2(w, 2)\n"
        "shutdown.end_process(Watcher(), Verdict('no'))"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=60)
    assert done.returncode == 75
