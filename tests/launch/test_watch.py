"""How the watch judges ranks that die, stall or stop."""

import re
import sys
import threading
import time

import pytest
from watch_fakes import Clock, Coordinator, go

from txcore import _compat
from txcore.launch.watch import shutdown, watch
from txcore.launch.watch.status import FAILED, FOLDER, VERDICT, Phase, Verdict
from txcore.launch.watch.watcher import Watcher


def test_ranks_that_live_are_left_alone(ranks, clock):
    go(ranks, clock, 100)
    assert [rank.verdict for rank in ranks] == [None] * 3
    assert {n: e.beat for n, e in ranks[0].table.items()} == {0: 100, 1: 99, 2: 99}


def test_a_rank_that_dies_is_named_alike_by_all(ranks, clock, coordinator):
    ranks[1].position = (Phase.STEP, 7, "")
    go(ranks, clock, 5)
    go(ranks, clock, 9, but=[1])
    assert ranks[0].verdict is None
    go(ranks, clock, 3, but=[1])
    text = (
        "rank 1 has not been heard of for 10 s: killed, stopped, or cut off from the network; "
        "last seen at step 7 (step)"
    )
    assert [rank.verdict for rank in ranks] == [Verdict(text), None, Verdict(text)]
    assert coordinator.rows[VERDICT] == Verdict(text).to_json()


def test_the_first_verdict_holds(ranks, clock, coordinator):
    go(ranks, clock, 1)
    first = Verdict("rank 2 failed at step 5 (data): ValueError: no", FAILED)
    ranks[1].tell_others(failed="KeyError: 1")
    ranks[1].exchange_entries()
    coordinator.rows[VERDICT] = first.to_json()  # between what rank 0 reads and what it writes
    ranks[0].table = {1: ranks[1].sent}
    assert ranks[0]._judge_run() == first


def test_a_rank_that_comes_back_in_time(ranks, clock):
    go(ranks, clock, 5)
    go(ranks, clock, 9, but=[1])
    go(ranks, clock, 20)
    assert [rank.verdict for rank in ranks] == [None] * 3


def test_a_coordinator_that_stood_still_makes_nobody_silent(ranks, clock):
    go(ranks, clock, 5)
    clock.now += 9.5  # nobody could write or read
    go(ranks, clock, 20)
    assert [rank.verdict for rank in ranks] == [None] * 3


def test_a_rank_that_stood_still_blames_nobody_at_once(ranks, clock):
    go(ranks, clock, 5)
    clock.now += 3600
    ranks[0].exchange_entries()  # the first one to go on
    assert ranks[0].verdict is None


def test_the_wall_clock_does_not_matter(coordinator, monkeypatch):
    def asked():
        raise AssertionError("the wall clock was asked")

    monkeypatch.setattr(time, "time", asked)
    rank = Watcher(coordinator, 0, 2)
    for _ in range(3):
        rank.exchange_entries()
    assert rank.find_verdict(0.0, False) is None


def test_a_step_that_takes_too_long(coordinator, clock):
    ranks = [Watcher(coordinator, rank, 2, step_timeout_s=30, clock=clock) for rank in range(2)]
    for step in range(50):
        for rank in ranks:
            rank.position = (Phase.STEP, step, "")
        go(ranks, clock, 1)
    ranks[1].position = (Phase.DATA, 50, "")
    go(ranks, clock, 28)
    assert ranks[0].verdict is None
    go(ranks, clock, 3)
    assert ranks[0].verdict == ranks[1].verdict
    assert re.fullmatch(
        r"step 49 takes more than 30 s: every rank waits in it|"
        r"step 49 takes more than 30 s: rank \d.*",
        ranks[0].verdict.text,
    )


def test_time_in_a_step_starts_anew_with_each(coordinator, clock):
    rank = Watcher(coordinator, 0, 1, step_timeout_s=5, clock=clock)
    for step in range(20):
        rank.position = (Phase.STEP, step, "")
        go([rank], clock, 4)
    assert rank.verdict is None
    go([rank], clock, 3)
    assert rank.verdict.text == "step 19 takes more than 5 s: every rank waits in it"


def test_many_ranks_ask_less_often():
    few, many = Watcher(Coordinator(), 0, 100), Watcher(Coordinator(), 0, 5000)
    assert (few.interval_s, few.peer_timeout_s) == (1.0, 10.0)
    assert (many.interval_s, many.peer_timeout_s) == (20.0, 60.0)
    # two calls of each rank
    assert 2 * 5000 / many.interval_s <= 500


def test_short_timeouts_ask_more_often():
    assert Watcher(Coordinator(), 0, 2, peer_timeout_s=2).interval_s == 0.4


def test_rows_that_strangers_wrote_are_passed_over(ranks, clock, coordinator):
    go(ranks, clock, 2)
    coordinator.rows |= {f"{FOLDER}9": "{}", f"{FOLDER}x": "?", VERDICT: "?", f"{FOLDER}1": "?"}
    ranks[0].exchange_entries()
    assert ranks[0].verdict is None
    assert ranks[0].table[1].beat == 1


@pytest.mark.parametrize(
    "waited, hung_up, text",
    [
        (9.9, False, None),
        (
            10.0,
            False,
            "rank 0 has not been heard of for 10 s: killed, stopped, or cut off from the network; "
            "last seen at step 0 (start)",
        ),
        (
            0.0,
            True,
            "rank 0 is gone, and with it the coordinator: killed or crashed; last seen at step 0 "
            "(start)",
        ),
    ],
)
def test_the_coordinator_is_judged_without_it(ranks, clock, waited, hung_up, text):
    go(ranks, clock, 1)
    verdict = ranks[1].find_verdict(waited, hung_up)
    assert verdict == (Verdict(text) if text else None)
    assert ranks[1].coordinator_lost is (text is not None)


def test_a_rank_that_fails_ends_by_its_own_error(ranks, clock):
    ranks[2].tell_others(failed="ValueError: no")
    go(ranks, clock, 2)
    assert ranks[0].find_verdict(0, False).text == "rank 2 failed at step 0 (start): ValueError: no"
    assert ranks[2].verdict is not None
    assert ranks[2].find_verdict(0, False) is None
    assert (
        ranks[2].find_verdict(11.0, False) is not None
    )  # but it does not wait for a dead coordinator


def test_a_rank_that_leaves_takes_closed_connections_for_its_own(ranks):
    ranks[1].leaving = True
    assert ranks[1].find_verdict(0, True) is None


def test_the_guard_counts_only_time_that_it_lives_through(coordinator, monkeypatch):
    """It counts up to the timeout in short steps, however long one of them took."""
    waits = iter([0.25] * 20 + [3600.0] + [0.25] * 200)
    clock, ended = Clock(), []
    rank = Watcher(coordinator, 1, 2, clock=clock)

    class NoLifeline:
        def wait(self, seconds):
            clock.now += next(waits)
            return False

    def end(watcher, verdict):
        ended.append((clock.now, verdict.text))
        watcher.closed = True

    monkeypatch.setattr(_compat, "coordination_client", lambda: coordinator)
    rank.guard_process(NoLifeline(), end)
    assert [text for _, text in ended] == [
        "rank 0 has not been heard of for 10 s: killed, stopped, or cut off from the network"
    ]
    # 20 + 16 short waits, and the long one, which counts for a second
    assert ended[0][0] == 1000 + 36 * 0.25 + 3600
    assert rank.stood_still_s() == 3600
    clock.now += 20
    assert rank.stood_still_s() == 0


@pytest.mark.parametrize("others", ["ended", "one goes on"])
def test_the_last_rank_says_once_what_it_does(others, ranks, clock, coordinator, monkeypatch):
    for rank in ranks[:2] if others == "ended" else ranks[:1]:
        rank.tell_others(ended=True)
    go(ranks, clock, 1)
    ranks[2].exchange_entries()
    said = []

    class NoLifeline:
        def wait(self, seconds):
            clock.now += seconds
            ranks[2].exchange_entries()
            ranks[2].closed = clock.now > 1200
            return False

    monkeypatch.setattr(_compat, "coordination_client", lambda: coordinator)
    monkeypatch.setattr(ranks[2], "peer_timeout_s", 1e6)
    ranks[2].guard_process(NoLifeline(), print, lambda watcher, seconds: said.append(seconds))
    assert [round(seconds) for seconds in said] == ([30] if others == "ended" else [])


def test_the_words_of_the_last_rank(ranks, capfd):
    ranks[2].position = (Phase.AFTER_FIT, 120, "")
    shutdown.write_last_rank(ranks[2], 30.2)
    said = capfd.readouterr().err
    assert said.startswith(
        "txcore: rank 2 is the last of 3: the others finished 30 s ago, and it is at step 120 "
        "(after fit), here:\nThread MainThread (most recent call first):\n"
    )
    assert re.search(r"test_watch.py., line \d+ in test_the_words_of_the_last_rank", said)


@pytest.mark.parametrize(
    "code, text, verdict",
    [
        (-9, "rank 1 was killed by SIGKILL; last seen at step 7 (step)", 75),
        (0, "rank 1 ended with exit code 0; last seen at step 7 (step)", 70),
        (3, "rank 1 ended with exit code 3; last seen at step 7 (step)", 70),
    ],
)
def test_a_rank_of_whose_end_the_launcher_tells_is_named_at_once(code, text, verdict, ranks, clock):
    ranks[1].position = (Phase.STEP, 7, "")
    go(ranks, clock, 2)
    ranks[0].hear_of_end(1, code)
    go(ranks, clock, 2, but=[1])
    assert ranks[0].verdict == ranks[2].verdict == Verdict(text, verdict)


@pytest.mark.parametrize("told", [{"ended": True}, {"ended": True, "failed": "ValueError: no"}])
def test_a_rank_that_said_that_it_ends_is_judged_by_that(told, ranks, clock):
    ranks[1].tell_others(**told)
    go(ranks, clock, 2)
    ranks[0].hear_of_end(1, 1)
    go(ranks, clock, 2, but=[1])
    said = ranks[0].verdict and ranks[0].verdict.text
    assert said == ("rank 1 failed at step 0 (start): ValueError: no" if "failed" in told else None)


def test_in_a_single_process_a_request_stops_at_the_next_boundary():
    alone = Watcher()
    assert alone.reach(0) is False
    alone.request_stop("SIGTERM")
    alone.request_stop("SIGINT")
    assert (alone.reach(1), alone.stop.reason) == (True, "SIGTERM")


def test_ranks_stop_before_the_same_step(ranks, clock):
    for step in range(4):
        assert not ranks[0].reach(step)
    assert not ranks[1].reach(0)
    ranks[1].request_stop("SIGTERM")
    go(ranks, clock, 2)
    go(ranks, clock, 1)
    assert [ranks[1].reach(step) for step in range(1, 5)] == [False] * 3 + [True]
    assert [ranks[2].reach(step) for step in range(5)] == [False] * 4 + [True]
    assert ranks[0].reach(4)
    assert {rank.stop.reason for rank in ranks} == {"SIGTERM on rank 1"}


def test_a_boundary_waits_for_the_agreement(ranks, clock):
    ranks[0].request_stop("SIGTERM")
    go(ranks, clock, 1, but=[1, 2])
    answers = []
    waits = threading.Thread(target=lambda: answers.append(ranks[0].reach(0)), daemon=True)
    waits.start()
    time.sleep(0.05)
    assert answers == []
    go(ranks, clock, 3)
    waits.join(5)
    assert answers == [True]


def test_nobody_waits_for_an_agreement_once_the_watch_has_ended(ranks):
    ranks[0].request_stop("SIGTERM")
    ranks[0].exchange_entries()
    ranks[0].closed = True
    assert ranks[0].reach(0) is True


@pytest.mark.parametrize("given", [{"peer_timeout_s": 0}, {"step_timeout_s": -1}])
def test_bad_timeouts(given):
    peer, step = given.get("peer_timeout_s", 10.0), given.get("step_timeout_s", 600.0)
    text = f"watch.start needs peer_timeout_s= and step_timeout_s= above 0, got {peer} and {step}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        watch.start(**given)


def test_alone_nothing_is_started():
    hook, threads = sys.excepthook, threading.active_count()
    watch.start()
    assert (sys.excepthook, threading.active_count()) == (hook, threads)
    watch.at("data", 3)
    assert watch.reach(3) is False
    watch.at("eval step", label="eval_step")
    assert watch._watcher.position == ("eval step", 3, "eval_step")
    assert watch.stop_reason() is None
    watch.failed(ValueError("no"))


def test_a_boundary_costs_next_to_nothing():
    """A generous bound: measured are 0.1 us for `at` and 0.3 us for `reach`."""
    rounds = 20_000

    def seconds():
        started = time.perf_counter()
        for step in range(rounds):
            watch.reach(step)
            watch.at("data", step)
            watch.at("step", step, "train_step")
        return (time.perf_counter() - started) / rounds

    assert min(seconds() for _ in range(5)) < 20e-6
