"""`txcore launch`: whom the last line names, and the ranks that go on after others have ended."""

import itertools
import re
import sys
import time

import pytest
from machine import within

from txcore.launch.launcher import hosts, supervise
from txcore.launch.watch.status import why_ended

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tested on Linux")
SILENT = "rank 1 has not been heard of for 10 s: killed, stopped, or cut off from the network"
SAYS_SO = f"echo 'txcore: rank 0 ends at step 5 (step): {SILENT}' >&2"


def ranks(*commands, **options):
    tasks = [hosts.Task(rank, ["sh", "-c", text]) for rank, text in enumerate(commands)]
    return supervise.launch_ranks(tasks, **options)


def text_of(failure):
    return re.sub(r"pid \d+", "pid P", failure.text)


@pytest.mark.parametrize("where", ["pipes", "files"])
def test_the_reason_of_a_rank_that_the_watch_ends_leads_the_last_line(where, tmp_path):
    folder = tmp_path if where == "files" else None
    failure = ranks(f"echo before; {SAYS_SO}; exit 75", "sleep 0.3; exit 75", output_dir=folder)
    assert text_of(failure) == f"{SILENT}; so rank 0 (pid P) ended with exit code 75"
    assert failure.exit_code == 75


def test_a_rank_that_cannot_say_it_is_named_by_another():
    """The first to end is not the one that has written why."""
    failure = ranks("exit 75", f"sleep 0.2; {SAYS_SO.replace('rank 0', 'rank 1')}; exit 75")
    assert text_of(failure) == f"{SILENT}; so rank 0 (pid P) ended with exit code 75"


def test_a_rank_that_jax_aborts_gives_way_to_one_that_the_watch_ended():
    failure = ranks(f"sleep 0.3; {SAYS_SO}; exit 75", "sleep 0.3; kill -ABRT $$")
    assert text_of(failure) == f"{SILENT}; so rank 0 (pid P) ended with exit code 75"


def test_a_rank_that_is_held_after_the_watch_has_spoken_gets_a_short_grace(monkeypatch):
    monkeypatch.setattr(supervise, "_WATCH_S", 0.5)
    monkeypatch.setattr(supervise, "_AFTER_WORDS_S", 1.0)
    begun = time.monotonic()
    failure = ranks(f"{SAYS_SO}; exit 75", "trap : TERM; while :; do sleep 1; done", grace_s=60)
    assert within(time.monotonic() - begun, 10)
    assert text_of(failure) == f"{SILENT}; so rank 0 (pid P) ended with exit code 75"


def test_a_stop_by_a_signal_to_one_rank_names_that_one():
    stopped = "SIGTERM on rank 1: stopped after 30 steps, all saved"
    failure = ranks(f"echo 'txcore: {stopped}' >&2; exit 143", "sleep 0.5; exit 143")
    assert text_of(failure) == f"{stopped}; so rank 0 (pid P) ended with exit code 143"


def test_who_ended_well_before_is_said_beside_who_failed():
    failure = ranks("sleep 0.5; exit 4", "exit 0", "sleep 5")
    assert text_of(failure) == (
        "rank 0 (pid P) ended with exit code 4; rank 1 had ended with exit code 0 before"
    )


@pytest.mark.parametrize(
    "line",
    [
        "txcore: rank 0 ends at step x (step): no",
        "rank 0 ends at step 5 (step): rank 1 is gone",
        "txcore: rank 0 was in step",
        "[0] txcore: SIGTERM on rank 2: stopped after 3 steps",
    ],
)
def test_other_words_are_no_reason(line):
    assert why_ended(line) is None


BUSY = "while :; do :; done"


@pytest.mark.parametrize("does, words", [("sleep 60", "does nothing"), (BUSY, "uses 0|uses 1")])
def test_it_says_for_whom_it_waits_and_what_that_does(does, words, monkeypatch, capfd):
    monkeypatch.setattr(supervise, "_LOOK_AGAIN_S", 0.5)
    monkeypatch.setattr(supervise, "_SAY_AFTER_S", (0.5, 1.5))
    assert ranks("exit 0", f"timeout 4 sh -c '{does}'; exit 0", "exit 0") is None
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    for line in said:
        found = re.fullmatch(
            rf"txcore: 2 ranks ended \d s ago; waiting for rank 1 \(pid \d+\), which ({words}).*",
            line,
        )
        assert found, line


def test_it_gives_up_on_ranks_that_do_nothing_and_on_no_others(monkeypatch, capfd):
    monkeypatch.setattr(supervise, "_LOOK_AGAIN_S", 0.3)
    failure = ranks("exit 0", "sleep 60", idle_s=1.0)
    assert text_of(failure) == (
        "rank 1 (pid P) did nothing for 1 s after others had ended (--idle): rank 1 (pid P) was "
        "killed by SIGTERM"
    )
    assert failure.exit_code == 143
    assert ranks("exit 0", f"timeout 4 sh -c '{BUSY}'; exit 0", idle_s=1.0) is None


def test_all_that_work_together_are_waited_for_in_silence(monkeypatch, capfd):
    monkeypatch.setattr(supervise, "_SAY_AFTER_S", (0.5, 1.5))
    assert ranks("sleep 2", "sleep 2", idle_s=0.1) is None
    assert capfd.readouterr().err == ""


def test_what_a_rank_has_started_counts_as_its_work():
    rank = hosts.start_task(hosts.Task(0, ["sh", "-c", f"sh -c '{BUSY}' & wait"]))
    try:
        before = hosts.busy_s(rank.pid)
        for _ in itertools.takewhile(lambda _: hosts.busy_s(rank.pid) <= before, range(200)):
            time.sleep(0.05)
        assert hosts.busy_s(rank.pid) > before
    finally:
        hosts.deliver_signal(rank.pid, 9)
        rank.wait()
