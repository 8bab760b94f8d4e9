"""Ranks that come to different things are named at once; ranks that are slow never are."""

import random
import threading

import pytest
from watch_fakes import Clock, Coordinator

from txcore import _compat
from txcore.launch import barrier, preflight
from txcore.launch.watch import watch
from txcore.launch.watch.order import KEPT, SAID, Order
from txcore.launch.watch.status import FAILED, RankEntry, read_entry
from txcore.launch.watch.verdict import judge_run
from txcore.launch.watch.watcher import Watcher

REMEDY = (
    ". Every rank has to make the same steps, evaluations, checkpoints and barriers in the same "
    "order, and to have as many batches in an epoch (tx.even_batches pads what is shorter): see "
    "what only one of them does"
)


def came_to(*events):
    order = Order()
    for event in events:
        order.add_event(event)
    return order


def entry(order, **more):
    return RankEntry(**order.entry_fields(), **more)


def verdicts(*orders):
    """Return what each rank says of all."""
    table = {rank: entry(order) for rank, order in enumerate(orders)}
    return [order.judge(rank, table) for rank, order in enumerate(orders)]


def text_of(*orders):
    """Return the text of those that see a difference, which is the same."""
    found = {verdict for verdict in verdicts(*orders) if verdict is not None}
    (verdict,) = found
    assert verdict.code == FAILED
    assert verdict.text.endswith(REMEDY)
    return verdict.text.removesuffix(REMEDY)


def test_ranks_at_other_places_of_one_order_are_alike():
    events = [f"step {i}" for i in range(20)]
    orders = [came_to(*events[:n]) for n in (0, 3, 19, 20)]
    assert verdicts(*orders) == [None] * 4


def test_a_rank_that_goes_another_way_is_named():
    both = ["step 1", "step 2"]
    orders = came_to(*both, "step 3"), came_to(*both, "the end"), came_to(*both, "step 3")
    assert text_of(*orders) == "rank 1 came to the end, where ranks 0 and 2 came to step 3"


def test_of_two_ranks_the_first_is_the_reference():
    assert text_of(came_to("a"), came_to("b")) == "rank 1 came to b, where rank 0 came to a"


@pytest.mark.parametrize("more", range(SAID))
def test_the_first_difference_is_named_where_ranks_go_on_after_it(more):
    """One that runs ahead has not come to what the other one waits in."""
    ahead = came_to("step 1", "step 2", *[f"later {i}" for i in range(more)])
    behind = came_to("step 1", "a barrier")
    text = "rank 1 came to a barrier, where rank 0 came to step 2"
    assert text_of(ahead, behind) == text
    # Whichever of them looks.
    table = {0: entry(ahead), 1: entry(behind)}
    assert ahead.judge(0, table).text == text + REMEDY
    if more < SAID - 1:  # else the other one no longer says it
        assert behind.judge(1, table).text == text + REMEDY


def test_a_difference_long_ago_is_found_by_its_digest():
    same = [f"step {i}" for i in range(2 * SAID)]
    text = f"rank 1 came to {same[-1]} by another way than rank 0"
    assert text_of(came_to("a", *same), came_to("b", *same)) == text


def test_what_is_older_than_what_is_kept_is_not_judged():
    late = came_to("step 0")
    early = came_to(*[f"step {i}" for i in range(KEPT + 5)])
    assert verdicts(late, early) == [None, None]


def test_random_orders():
    """Ranks that follow one order anyhow far are alike; one change at any place is found."""
    rng = random.Random(0)
    for _ in range(200):
        events = [rng.choice("abc") for _ in range(rng.randrange(1, 40))]
        others = [came_to(*events[: rng.randrange(len(events) + 1)]) for _ in range(3)]
        assert verdicts(*others) == [None] * 3
        at = rng.randrange(len(events))
        changed = [*events[:at], "d", *events[at + 1 :]]
        assert any(verdicts(came_to(*events), came_to(*changed)))


def test_a_row_of_the_table_is_read_as_it_was_written():
    row = entry(came_to(*[f"step {i}" for i in range(9)]), waits=3.5)
    assert read_entry(row.to_json()) == row
    assert len(row.to_json()) < 200


LIMITS = {"peer_timeout_s": 10, "suspect_s": 3, "step_timeout_s": 60}


def ended(count, **more):
    return RankEntry(ended=True, count=count, **more)


@pytest.mark.parametrize("waits", [9.9, 10.0])
def test_a_rank_that_ended_while_another_came_to_more(waits):
    table = {0: ended(4), 1: RankEntry(count=5, events="step 4\nthe barrier 'b'", waits=waits)}
    verdict = judge_run(table, {0: 99, 1: 0}, **LIMITS)
    if waits < 10:
        assert verdict is None
        return
    assert verdict.text == (
        "rank 0 ended the program, but rank 1 came to the barrier 'b' after that, which needs "
        "every rank: see what only one of them does"
    )
    assert verdict.code == FAILED


def test_a_rank_that_ended_where_all_came_to_the_same():
    table = {0: ended(5), 1: RankEntry(count=5, waits=1e6), 2: RankEntry(count=4, waits=1e6)}
    assert judge_run(table, dict.fromkeys(table, 0), **LIMITS) is None


@pytest.fixture
def two(monkeypatch):
    coordinator, clock = Coordinator(2), Clock()
    return [Watcher(coordinator, rank, 2, clock=clock) for rank in range(2)], clock


def test_the_watch_compares_and_all_hear_the_same(two):
    ranks, clock = two
    for step in range(3):
        for rank in ranks:
            rank.meet(f"step {step}")
    ranks[0].meet("step 3")
    for _ in range(1000):  # one rank is as slow as it likes
        clock.now += 1
        for rank in ranks:
            rank.exchange_entries()
    assert [rank.verdict for rank in ranks] == [None, None]
    ranks[1].meet("an evaluation")
    clock.now += 1
    for rank in reversed(ranks):
        rank.exchange_entries()
    ranks[1].exchange_entries()
    text = "rank 1 came to an evaluation, where rank 0 came to step 3" + REMEDY
    assert [rank.verdict.text for rank in ranks] == [text, text]


def test_seconds_since_the_last_event(two):
    (rank, _), clock = two
    rank.meet("step 0")
    for _ in range(4):
        clock.now += 1
        rank.exchange_entries()
    assert rank.sent.waits == 2  # listened for from the first reading on
    rank.meet("step 1")
    clock.now += 1
    rank.exchange_entries()
    assert rank.sent.waits == 0


def test_other_threads_come_to_things_in_no_order(two):
    (rank, _), _ = two
    thread = threading.Thread(target=rank.meet, args=("a barrier",))
    thread.start()
    thread.join()
    assert rank.order.last.number == 0
    rank.meet("two\nlines")
    assert rank.order.last.event == "two lines"


def test_barriers_and_comparisons_note_themselves(two, monkeypatch):
    (rank, _), _ = two
    coordinator = Coordinator(1)
    monkeypatch.setattr(watch, "_watcher", rank)
    monkeypatch.setattr(_compat, "coordination_client", lambda: coordinator)
    monkeypatch.setattr(_compat, "coordination_size", lambda: 2)
    monkeypatch.setattr(preflight, "compare_facts", lambda *_: None)
    barrier("data")
    preflight.check("step", {})
    assert (
        rank.order.entry_fields()["events"]
        == "the start\nthe barrier 'data'\na comparison of the ranks"
    )


def test_alone_nothing_is_noted():
    watch.meet("step")
    assert watch._watcher.order.last.number == 0
