"""What the ranks' entries say: who is blamed, in which words, and who is not."""

import json

import pytest

from txcore.launch.watch.silence import SilenceCounter
from txcore.launch.watch.status import (
    FAILED,
    TRY_AGAIN,
    RankEntry,
    Verdict,
    read_entry,
    read_verdict,
)
from txcore.launch.watch.verdict import (
    describe_lost_coordinator,
    describe_silence,
    judge_run,
    rank_names,
)

LIMITS = {"peer_timeout_s": 10, "suspect_s": 3, "step_timeout_s": 60}
GLOO = "JaxRuntimeError: Gloo all-reduce failed: Connection closed by peer"


def table(*entries):
    return dict(enumerate(entries))


def ask(*entries, silent=(), **limits):
    seconds = dict.fromkeys(range(len(entries)), 0.5) | dict(silent)
    return judge_run(table(*entries), seconds, **LIMITS | limits)


def step(number=5, seconds=1.0, **more):
    return RankEntry(step=number, phase="step", seconds=seconds, **more)


def data(number=5, seconds=1.0, **more):
    return RankEntry(step=number, phase="data", seconds=seconds, **more)


@pytest.mark.parametrize(
    "entries",
    [
        [step(), step()],
        [step(5), data(6), RankEntry()],
        [step(seconds=59.9), data(seconds=1e6)],
        [data(seconds=1e6), RankEntry(phase="compile", seconds=1e6)],
        [RankEntry(ended=True, step=9), step(8, seconds=50)],  # it was ahead: it made step 8
        [RankEntry(ended=True, step=5), step(5, seconds=9.9)],
        [step(), step(stop=6, reason="SIGTERM on rank 1")],
        [step(lost=GLOO, seconds=9.9), step()],
    ],
)
def test_a_run_that_goes_on(entries):
    assert ask(*entries) is None


def test_a_failure_is_named_with_its_error():
    verdict = ask(step(), data(120, failed="ValueError: batch 7 is damaged"), step())
    assert verdict == Verdict(
        "rank 1 failed at step 120 (data): ValueError: batch 7 is damaged", FAILED
    )


def test_a_failure_counts_more_than_what_follows_from_it():
    failure = data(failed="ValueError: no", ended=True)
    verdict = ask(step(lost=GLOO), failure, step(), silent={1: 99, 2: 99})
    assert verdict.text == "rank 1 failed at step 5 (data): ValueError: no"


def test_many_failures_are_cut():
    verdict = ask(*[data(failed=f"ValueError: {i}") for i in range(5)])
    assert verdict.text == (
        "rank 0 failed at step 5 (data): ValueError: 0; rank 1 failed at step 5 (data): "
        "ValueError: 1; rank 2 failed at step 5 (data): ValueError: 2; 2 others"
    )


def test_a_silent_rank():
    assert ask(step(), step(), silent={1: 9.9}) is None
    assert ask(step(7), step(6), silent={1: 10.2}) == Verdict(
        "rank 1 has not been heard of for 10 s: killed, stopped, or cut off from the network; "
        "last seen at step 6 (step)",
        TRY_AGAIN,
    )


def test_several_silent_ranks_one_of_which_never_spoke():
    seconds = {0: 0.1, 1: 12.0, 2: 11.0, 3: 14.0}
    verdict = judge_run({0: step(), 1: step(), 2: data()}, seconds, **LIMITS)
    assert verdict.text == (
        "ranks 1, 2 and 3 have not been heard of for 11 s: killed, stopped, or cut off from the "
        "network; last seen at step 5 (step), at step 5 (data)"
    )


def test_after_a_lost_connection_a_rank_is_suspected_sooner():
    assert ask(step(), step(), silent={1: 3.1}) is None
    verdict = ask(step(lost=GLOO), step(), step(), silent={1: 3.1})
    assert verdict.text.startswith("rank 1 has not been heard of for 3 s: ")


def test_a_rank_that_has_ended_is_not_silent():
    assert ask(step(), RankEntry(ended=True, step=9), silent={1: 500}) is None


@pytest.mark.parametrize("waiting", [step(8, seconds=10.0), step(8, lost=GLOO)])
def test_a_rank_that_ends_early(waiting):
    ended = RankEntry(phase="after fit", step=5, ended=True)
    assert ask(waiting, ended, step(8), data(8)) == Verdict(
        "rank 1 ended the program at step 5 (after fit), but ranks 0 and 2 wait for it in step "
        "8: every rank has to make the same steps (is there less data on one, or a sys.exit()?)",
        FAILED,
    )


def test_a_broken_connection_between_living_ranks():
    verdict = ask(step(lost=GLOO, seconds=10.0), step())
    assert verdict == Verdict(f"rank 0 lost a connection, though every rank is alive: {GLOO}")


def test_a_rank_that_stalls():
    verdict = ask(step(seconds=60.0), data(seconds=61.0), step(6, seconds=5.0), data(6))
    assert verdict == Verdict(
        "step 6 takes more than 60 s: rank 0 is at step 5 (step) for 60 s; rank 1 is at step 5 "
        "(data) for 61 s; rank 3 is at step 6 (data) for 1 s"
    )
    assert ask(step(seconds=60.0), RankEntry(step=5, phase="start")).text == (
        "step 5 takes more than 60 s: rank 1 is at step 5 (start) for 0 s"
    )


@pytest.mark.parametrize("phase", ["step", "eval step"])
def test_a_step_that_hangs_on_every_rank(phase):
    verdict = ask(*2 * [RankEntry(step=5, phase=phase, seconds=60.0)])
    assert verdict == Verdict("step 5 takes more than 60 s: every rank waits in it")


def test_many_ranks_that_stall_are_cut():
    verdict = ask(step(seconds=600.0), *11 * [data()], step_timeout_s=600)
    assert verdict.text.count("at step 5 (data) for 1 s") == 8
    assert verdict.text.endswith("; 3 others")


def test_the_coordinator():
    assert describe_lost_coordinator(table(step(7))) == (
        "rank 0 is gone, and with it the coordinator: killed or crashed; last seen at step 7 (step)"
    )
    assert describe_silence([0], 10.2, {}) == (
        "rank 0 has not been heard of for 10 s: killed, stopped, or cut off from the network"
    )


@pytest.mark.parametrize(
    "ranks, text",
    [
        ([4], "rank 4"),
        ([4, 1], "ranks 1 and 4"),
        (range(8), "ranks 0, 1, 2, 3, 4, 5, 6 and 7"),
        (range(9), "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 8"),
        (range(10), "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 others"),
    ],
)
def test_names_of_ranks(ranks, text):
    assert rank_names(ranks) == text


@pytest.mark.parametrize(
    "entry",
    [
        RankEntry(),
        RankEntry(3, 120, "step", 1.5, 121, "SIGTERM", "E: f", "E: l", True),
        RankEntry(seconds=2, ended=True),
    ],
)
def test_entries_are_read_as_they_were_written(entry):
    assert read_entry(entry.to_json()) == entry


def test_an_entry_is_short():
    assert RankEntry(beat=7, step=120, phase="step").to_json() == (
        '{"beat": 7, "step": 120, "phase": "step"}'
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "null",
        '{"other": 1}',
        '{"step": "1"}',
        '{"step": 1.5}',
        '{"step": true}',
        '{"step": null}',
        '{"ended": 1}',
        '{"seconds": "1"}',
        '{"stop": "1"}',
        '{"failed": 3}',
    ],
)
def test_what_strangers_write_is_no_entry(text):
    assert read_entry(text) is None


def test_verdicts_are_read_as_they_were_written():
    verdict = Verdict("rank 1 failed", FAILED)
    assert read_verdict(verdict.to_json()) == verdict


@pytest.mark.parametrize(
    "value", [None, [], {}, {"text": 1}, {"text": "a", "code": 0}, {"text": "a", "why": "b"}]
)
def test_what_strangers_write_is_no_verdict(value):
    assert read_verdict(json.dumps(value)) is None
    assert read_verdict("{") is None


def test_silence_is_counted_while_listening():
    hearing = SilenceCounter(3, longest_gap_s=2.0)
    hearing.take_in({0: 1, 1: 1}, 100.0)
    hearing.take_in({0: 2, 1: 1}, 101.0)
    assert hearing.silent_seconds() == {0: 0.0, 1: 1.0, 2: 1.0}
    hearing.take_in({0: 3, 1: 1, 2: 1}, 102.5)
    assert hearing.silent_seconds() == {0: 0.0, 1: 2.5, 2: 0.0}


def test_a_gap_in_listening_is_nobodys_silence():
    hearing = SilenceCounter(2, longest_gap_s=2.0)
    hearing.take_in({0: 1, 1: 1}, 100.0)
    hearing.take_in({0: 2, 1: 1}, 500.0)  # this process was stopped for 400 s
    assert hearing.silent_seconds() == {0: 0.0, 1: 2.0}
    hearing.take_in({0: 3, 1: 2}, 501.0)
    assert hearing.silent_seconds() == {0: 0.0, 1: 0.0}
