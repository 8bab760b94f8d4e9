"""Real runs of two and three ranks over gloo in which one rank dies, stalls, fails, or leaves."""

import re
import signal
import sys
import time

import pytest
import watch_run
from machine import within
from watch_run import finish, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the signals and sockets are Linux's"),
]
FOREVER = 10**6
# Sooner than the defaults, but not so soon that a busy machine looks dead.
SOON = {"peer_timeout_s": 8, "step_timeout_s": 60}
BOUND_S = 25  # from the fault to the end of each rank
LABEL = "train_step, whose last collective is psum/loss (worker.py:1)"


@pytest.fixture
def start():
    """Start runs that do not outlive the test."""
    started = []

    def start_one(*args, **plan):
        started.append(watch_run.start(*args, **plan))
        return started[-1]

    yield start_one
    for ranks in started:
        watch_run.kill(ranks)


def under_way(ranks):
    """Wait until all ranks have made steps and told each other so."""
    wait_until(lambda: all(rank.said("made 10") for rank in ranks))
    time.sleep(1)


def ends(rank):
    """Return (rank, step, phase, why) of a rank's last words."""
    found = re.findall(r"^txcore: rank (\d) ends at step (\d+) \(([\w ]+)\): (.*)$", rank.err, re.M)
    assert len(found) == 1, rank.err
    number, step, phase, why = found[0]
    return int(number), int(step), phase, why


def assert_last_words(ranks, why, but=(), phase="step", code=75, since=None):
    """Hold every rank that is left to its last words; `why` is a pattern."""
    for number, rank in enumerate(ranks):
        if number in but:
            continue
        said = ends(rank)
        assert said[0] == number
        assert re.fullmatch(why, said[3]), said[3]
        assert said[2] == phase
        assert f"txcore: rank {number} was in {LABEL}\n" in rank.err
        # Its stack; or, where gloo told it, the traceback.
        assert re.search(r'  File ".*watch_worker.py", line \d+,? in main\n', rank.err)
        assert "Thread MainThread (most recent call first):\n" in rank.err
        assert rank.code == code, rank.err
        if since:
            assert within(rank.ended - since, BOUND_S)


@pytest.mark.parametrize(
    "world, victim", [(2, 1), pytest.param(3, 1, marks=pytest.mark.extra), (3, 2)]
)
def test_a_rank_is_killed(start, world, victim):
    ranks = start(world, steps=FOREVER, watch=SOON)
    under_way(ranks)
    killed = time.time()
    ranks[victim].process.kill()
    finish(ranks)

    why = (
        rf"rank {victim} has not been heard of for \d s: killed, stopped, or cut off from the "
        r"network; last seen at step \d+ \(\w[\w ]+\)"
    )
    assert_last_words(ranks, why, but=[victim], since=killed)
    # gloo's error is not lost over it, on the rank that had it
    assert any(re.search(r"^\S*Error: .*[Gg]loo", rank.err, re.M) for rank in ranks)


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.extra), 3])
def test_the_coordinator_is_killed(start, world):
    left = []
    for _ in range(3):  # jax aborts 0.1 to 0.3 s later: on a busy machine it may be faster
        ranks = start(world, steps=FOREVER, watch=SOON)
        under_way(ranks)
        killed = time.time()
        ranks[0].process.kill()
        finish(ranks)
        left = [(number, rank) for number, rank in enumerate(ranks) if rank.code == 75]
        for rank in ranks[1:]:
            assert rank.code in (75, -signal.SIGABRT), rank.err
            assert within(rank.ended - killed, BOUND_S)
        if left:
            break

    assert left
    for number, rank in left:
        assert ends(rank)[0] == number
        assert re.match(r"rank 0 is gone, and with it the coordinator: killed or ", ends(rank)[3])
        assert "Thread MainThread (most recent call first):\n" in rank.err


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.extra), 2])
def test_a_rank_is_stopped_and_goes_on_after_the_others_have_ended(start, victim):
    ranks = start(3, steps=FOREVER, watch=SOON)
    under_way(ranks)
    stopped = time.time()
    ranks[victim].process.send_signal(signal.SIGSTOP)
    others = [rank for number, rank in enumerate(ranks) if number != victim]
    wait_until(lambda: all(rank.ended for rank in others))
    ranks[victim].process.send_signal(signal.SIGCONT)
    finish(ranks)

    assert_last_words(
        ranks, rf"rank {victim} has not been heard of for \d+ s: .*", [victim], since=stopped
    )
    assert ranks[victim].code in (75, -signal.SIGABRT), ranks[victim].err
    assert "(this rank itself had stood still for " in ranks[victim].err


def test_a_short_stop_and_a_busy_interpreter_do_no_harm(start):
    fault = {"rank": 1, "step": 20, "kind": "hold", "seconds": 3}
    ranks = start(2, steps=150, step_s=0.02, watch={"peer_timeout_s": 8}, fault=fault)
    wait_until(lambda: ranks[1].said("fault"))
    time.sleep(4)
    for rank in ranks:
        rank.process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        rank.process.send_signal(signal.SIGCONT)
    finish(ranks)

    assert [rank.code for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    assert all(rank.said("done 149") for rank in ranks)
    assert not any("txcore:" in rank.err for rank in ranks)


def test_a_rank_stalls(start):
    fault = {"rank": 1, "step": 20, "kind": "sleep", "seconds": 600}
    ranks = start(3, steps=FOREVER, watch={"step_timeout_s": 10}, fault=fault)
    finish(ranks)

    fell_asleep = ranks[1].said("fault")
    why = r"step 20 takes more than 10 s: rank 1 is at step 20 \(data\) for \d+ s"
    assert_last_words(ranks, why, but=[1], since=fell_asleep)
    assert (ends(ranks[1])[1:3], ranks[1].code) == ((20, "data"), 75)
    assert re.fullmatch(why, ends(ranks[1])[3])
    assert re.search(r'watch_worker.py", line \d+ in do\n', ranks[1].err), "where it stalls"


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_rank_fails(start, culprit):
    fault = {"rank": culprit, "step": 20, "kind": "raise"}
    ranks = start(3, steps=FOREVER, watch=SOON, fault=fault)
    finish(ranks)

    why = rf"rank {culprit} failed at step 20 \(data\): ValueError: batch 7 is damaged"
    assert_last_words(ranks, why, but=[culprit], code=70, since=ranks[culprit].said("fault"))
    failed = ranks[culprit]
    assert failed.err.rstrip().endswith("\nValueError: batch 7 is damaged")
    assert failed.err.count("Traceback") == 1
    assert "txcore:" not in failed.err
    assert failed.code == 1


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_ends_its_program_early(start, culprit):
    fault = {"rank": culprit, "step": 20, "kind": "exit"}
    ranks = start(3, steps=FOREVER, watch=SOON, fault=fault)
    finish(ranks)

    others = " and ".join(str(number) for number in range(3) if number != culprit)
    why = (
        rf"rank {culprit} ended the program at step 20 \(data\), but ranks? ({others}|\d) waits? "
        r"for it in step 20: every rank has to make the same steps \(is there less data on one, or "
        r"a sys.exit\(\)\?\)"
    )
    assert_last_words(ranks, why, but=[culprit], code=70, since=ranks[culprit].said("fault"))
    assert (
        ranks[culprit].code == 3
    )  # its own, though as the coordinator it stays until the others end
    assert "ends at step" not in ranks[culprit].err


@pytest.mark.parametrize("asked", [[2], [0, 1]])
def test_a_signal_to_some_ranks_stops_all_before_the_same_step(start, asked):
    fault = {"ranks": asked, "step": 20, "kind": "term"}
    ranks = start(3, steps=FOREVER, fault=fault)
    finish(ranks)

    stopped = [re.findall(r"stops before (\d+) (.*)$", rank.out, re.M)[0] for rank in ranks]
    assert len({step for step, _ in stopped}) == 1
    assert 21 <= int(stopped[0][0]) < 200
    assert {reason for _, reason in stopped} <= {f"SIGTERM on rank {rank}" for rank in asked}
    assert [rank.code for rank in ranks] == [0] * 3
    assert not any("txcore:" in rank.err for rank in ranks)


def test_ranks_that_end_at_different_times(start):
    """The coordinator stays for the others; without the watch jax aborts those that come later."""
    ranks = start(3, steps=30, watch=SOON, after_s={"1": 12})
    finish(ranks)

    assert [rank.code for rank in ranks] == [0] * 3, [rank.err for rank in ranks]
    assert ranks[0].ended >= ranks[1].said("done") + 12
    assert "".join(re.findall(r"^txcore: .*\n", ranks[0].err, re.M)) == (
        "txcore: rank 0 has finished, and stays as the coordinator until rank 1 has finished too; "
        "last seen at step 30 (after fit)\n"
    )
    for rank in ranks[1:]:
        assert re.sub(r"^.*\[?Gloo\]?.*\n", "", rank.err, flags=re.M) == ""
    assert ranks[2].ended < ranks[1].said("done") + 12  # it does not wait for anybody
