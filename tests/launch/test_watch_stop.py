"""The agreement to stop: whatever the order of events, all ranks stop before the same step."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from txcore.launch.watch.status import RankEntry
from txcore.launch.watch.stop import Stop


class Rank:
    """A rank of a simulated run: its main thread and the one of the table, in single actions."""

    def __init__(self, run, number):
        self.run, self.number = run, number
        self.stop = Stop()
        self.boundary = 0  # of the step that comes next
        self.at_boundary = False
        self.stopped = self.finished = self.ended = False
        self.entry = RankEntry()

    def main(self):
        """Do the main thread's next thing; return whether there was any."""
        if self.stopped or self.finished:
            return False
        slowest = min(rank.boundary for rank in self.run.ranks)
        if self.boundary == self.run.steps:  # at the end a rank waits for its last step
            self.finished = slowest == self.run.steps
            return self.finished
        if not self.at_boundary:
            # A step waits for all ranks, and the host runs ahead of it by a few.
            if self.boundary - self.run.ahead > slowest:
                return False
            self.stop.reach_boundary()
            self.at_boundary = True
        else:
            decided = self.stop.decide_stop()
            if decided is None:
                return False
            self.stopped = decided
            self.boundary += not decided
            self.at_boundary = False
        return True

    def choose(self):
        """Make the entry, which is not written yet."""
        if not self.ended:
            self.entry = RankEntry(
                stop=self.stop.own_proposal(),
                reason=self.stop.reason or "",
                ended=self.finished and self.run.programs_end,
            )

    def write(self):
        if not self.ended:
            self.run.table[self.number] = self.entry
            self.ended = self.entry.ended

    def read(self):
        if not self.ended:
            self.stop.take_in(dict(self.run.table), len(self.run.ranks))

    def ask(self):
        self.stop.reason = self.stop.reason or f"SIGTERM on rank {self.number}"


class Run:
    def __init__(self, world, steps, ahead, programs_end):
        self.steps, self.ahead, self.programs_end = steps, ahead, programs_end
        self.table = {}
        self.ranks = [Rank(self, number) for number in range(world)]

    def settle(self):
        """Let everybody go on until nothing happens any more."""
        for _ in range(20 * (self.steps + 2)):
            for rank in self.ranks:
                rank.choose()
                rank.write()
                rank.read()
            moved = [rank.main() for rank in self.ranks]
        assert not any(moved)


ACTIONS = ("main", "main", "choose", "write", "read")


@settings(max_examples=400, deadline=None)
@given(
    world=st.integers(1, 5),
    steps=st.integers(1, 8),
    ahead=st.integers(0, 3),
    programs_end=st.booleans(),
    schedule=st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from((*ACTIONS, "ask"))), max_size=150
    ),
)
# Rank 0 passes boundary 1 between the choice and the publication of its proposal.
@example(
    2, 5, 2, False, [(0, "main"), (0, "ask"), (0, "choose"), (0, "main"), (0, "main"), (0, "write")]
)
# Rank 1 has ended its program before rank 0 is asked, in its last step.
@example(
    2,
    1,
    3,
    True,
    [(n, "main") for n in (1, 0, 1, 0, 1)] + [(1, "choose"), (1, "write"), (0, "ask")],
)
def test_all_stop_before_the_same_step_or_all_finish(world, steps, ahead, programs_end, schedule):
    run = Run(world, steps, ahead, programs_end)
    for number, action in schedule:
        getattr(run.ranks[number % world], action)()
    run.settle()

    assert all(rank.stopped or rank.finished for rank in run.ranks), "they wait for each other"
    assert len({rank.boundary for rank in run.ranks}) == 1
    assert len({rank.stopped for rank in run.ranks}) == 1
    reasons = {rank.stop.reason for rank in run.ranks if rank.stopped}
    assert len(reasons) <= 1 or len({n for n, a in schedule if a == "ask"}) > 1


@settings(deadline=None)
@given(asked=st.integers(0, 2), passed=st.lists(st.integers(0, 6), min_size=3, max_size=3))
def test_a_run_that_is_asked_early_does_stop(asked, passed):
    run = Run(3, 50, 10, False)
    for rank, count in zip(run.ranks, passed, strict=True):
        for _ in range(2 * count):
            rank.main()
    run.ranks[asked].ask()
    run.settle()

    assert [rank.stopped for rank in run.ranks] == [True] * 3
    assert len({rank.boundary for rank in run.ranks}) == 1
    assert max(passed) <= run.ranks[0].boundary <= max(passed) + 1


def test_nobody_asked():
    stop = Stop()
    stop.reach_boundary()
    assert (stop.own_proposal(), stop.decide_stop(), stop.reason) == (None, False, None)
    stop.take_in({0: RankEntry(), 1: RankEntry()}, 2)
    assert (stop.own_proposal(), stop.target) == (None, None)


def test_after_stopping_every_boundary_stops():
    stop = Stop()
    stop.reason = "SIGTERM"
    stop.reach_boundary()
    stop.take_in({0: RankEntry(stop=stop.own_proposal())}, 1)
    assert stop.decide_stop() is False
    for _ in range(3):
        stop.reach_boundary()
        assert stop.decide_stop() is True


@pytest.mark.parametrize("late", [{}, {1: RankEntry()}])
def test_a_rank_that_has_not_answered_is_waited_for(late):
    stop = Stop()
    stop.reason = "SIGTERM on rank 0"
    mine = {0: RankEntry(stop=stop.own_proposal(), reason=stop.reason)}
    stop.reach_boundary()
    stop.take_in(mine | late, 2)
    assert stop.decide_stop() is None
    stop.take_in(mine | {1: RankEntry(stop=4)}, 2)
    assert (stop.decide_stop(), stop.target) == (False, 4)


def test_the_reason_is_that_of_the_rank_that_was_asked():
    stop = Stop()
    stop.take_in({0: RankEntry(), 1: RankEntry(stop=3, reason="SIGTERM on rank 1")}, 2)
    assert stop.reason == "SIGTERM on rank 1"
    assert stop.own_proposal() == 1


def test_a_rank_that_has_ended_is_not_waited_for_but_what_it_proposed_counts():
    stop = Stop()
    stop.reason = "SIGTERM on rank 0"
    mine = {0: RankEntry(stop=stop.own_proposal(), reason=stop.reason)}
    stop.take_in(mine | {1: RankEntry(ended=True)}, 2)
    assert stop.target == 1
    stop.take_in(mine | {1: RankEntry(ended=True, stop=7)}, 2)
    assert stop.target == 7
