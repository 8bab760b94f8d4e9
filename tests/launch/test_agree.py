"""What the ranks tell each other of their parts: one answer on all, whoever fails or is late."""

import json
import threading
import time

import pytest
from machine import within
from watch_fakes import Coordinator

from txcore import _compat
from txcore.launch.key_value import agree_on_problem

_rank = threading.local()


@pytest.fixture
def ranks(monkeypatch):
    """Run a function of the rank on three ranks, each a thread; return (answers, coordinator)."""
    coordinator = Coordinator(3)
    monkeypatch.setattr(_compat, "coordination_client", lambda: coordinator)
    monkeypatch.setattr(_compat, "coordination_size", lambda: 3)
    monkeypatch.setattr(_compat, "coordination_rank", lambda: _rank.number)

    def run(function, who=(0, 1, 2)):
        answers = {}

        def one(rank):
            _rank.number = rank
            try:
                answers[rank] = function(rank)
            except RuntimeError as error:
                answers[rank] = str(error).partition(":")[0]

        threads = [threading.Thread(target=one, args=(rank,)) for rank in who]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers, coordinator

    return run


@pytest.mark.parametrize(
    "problems, answer",
    [
        ({}, None),
        ({1: "it is full"}, "rank 1: it is full"),
        ({0: "a", 2: "b"}, "rank 0: a; rank 2: b"),
        ({0: "it is full", 2: "it is full"}, "ranks 0 and 2: it is full"),
        ({0: "no orbax", 1: "no orbax", 2: "no orbax"}, "no orbax"),
    ],
)
def test_all_get_the_same_answer(problems, answer, ranks):
    concluded = []
    answers, coordinator = ranks(
        lambda rank: agree_on_problem("save", problems.get(rank), lambda: concluded.append(rank))
    )
    assert answers == {0: answer, 1: answer, 2: answer}
    assert concluded == ([0] if answer is None else [])
    assert coordinator.rows == {"txcore/save/all": json.dumps(answer)}, "the words are deleted"


def test_what_rank_0_finds_at_the_end(ranks):
    answers, _ = ranks(
        lambda rank: agree_on_problem("save", None, lambda: "no space for the manifest")
    )
    assert set(answers.values()) == {"rank 0: no space for the manifest"}


def test_who_is_late_is_named_and_waited_for_no_longer(ranks):
    started = time.monotonic()
    answers, _ = ranks(lambda rank: agree_on_problem("save", None, timeout_s=0.3), who=(0, 1))
    assert answers == dict.fromkeys((0, 1), "rank 2: not heard of for 0.3 s")
    assert within(time.monotonic() - started, 3)


def test_where_rank_0_does_not_come_nobody_waits_for_ever(ranks):
    answers, _ = ranks(lambda rank: agree_on_problem("save", None, timeout_s=0.2), who=(1, 2))
    assert set(answers.values()) == {"DEADLINE_EXCEEDED"}


def test_a_long_text_is_cut(ranks):
    answers, _ = ranks(lambda rank: agree_on_problem("save", "x" * 10_000 if rank == 1 else None))
    assert answers[2] == f"rank 1: {'x' * 2000}"
