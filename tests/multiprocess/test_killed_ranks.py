"""A rank is killed, or stopped: the others end and name it, and the rest of the run is the same."""

import functools
import os
import signal

import pytest
import runs

pytest.importorskip("orbax.checkpoint")
pytestmark = pytest.mark.slow
SLOWLY = ("--pause", 0.1)  # so that the signal comes before the end


ALL = os.environ.get("TXCORE_ALL_RANKS") == "1"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the losses and the seconds of a run of so many ranks that nobody hits, made once."""
    return functools.cache(
        lambda world: runs.uninterrupted(tmp_path_factory.mktemp("whole") / "run", world)
    )


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.extra)])
def test_kills_at_random_moments(world, tmp_path, uninterrupted):
    number = 10 if ALL else 4 - world
    whole = uninterrupted(world)
    lines = list(runs.kill_and_resume(tmp_path, whole, world, number, 10 + world))
    assert len(lines) == number
    assert number == 1 or any("a save under way" in line for line in lines)


@pytest.mark.parametrize("victim", range(3) if ALL else [0, 2])  # the coordinator lies in rank 0
def test_a_stalled_rank_is_named(victim, tmp_path):
    found = runs.hit(tmp_path / "run", 3, victim, signal.SIGSTOP, 0.5, *SLOWLY)
    runs.check_ended(found, victim)


def test_a_rank_that_stalls_for_a_moment_is_waited_for(tmp_path, uninterrupted):
    curve, _ = uninterrupted(2)
    folder = tmp_path / "run"
    folder.mkdir()
    ranks = runs.start(folder, 2)
    try:
        runs.wait_for_checkpoint(folder, ranks)
        ranks[1].send_signal(signal.SIGSTOP)
        assert runs.wait(ranks[:1], 2) == [None]
        ranks[1].send_signal(signal.SIGCONT)
        assert runs.wait(ranks, runs.patience(runs.START_S)) == [0, 0], runs.shown(
            runs.said(folder, 2)
        )
    finally:
        runs.stop(ranks)
    assert runs.losses(folder) == curve


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.extra)])
def test_sigterm_to_one_rank_stops_all_at_the_same_step_saved(world, tmp_path, uninterrupted):
    curve, _ = uninterrupted(world)
    last = world - 1
    found = runs.hit(tmp_path / "run", world, last, signal.SIGTERM, 0.4, *SLOWLY)
    assert found["survivors"] == dict.fromkeys(range(last), 143), runs.shown(found["said"])
    assert f"txcore: SIGTERM on rank {last}: stopped after " in found["said"][0]
    made = max(runs.losses(tmp_path / "run"))
    assert (tmp_path / "run" / "saved" / f"step_{made:08d}").exists()
    assert runs.resume(tmp_path / "run", world) == curve
