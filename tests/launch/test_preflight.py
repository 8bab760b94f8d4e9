"""Ranks compare what they are about to run: in memory, and in real runs over gloo."""

import json
import pathlib
import re
import threading

import jax
import numpy as np
import pytest
import watch_run
from watch_fakes import Coordinator

import txcore as tx
from txcore.launch import MismatchError, preflight

WORKER = pathlib.Path(__file__).with_name("preflight_worker.py")
REMEDY = (
    "Nothing was run. Start every rank with the same script, arguments, settings, data and packages"
)


def compare(facts, coordinator=None, timeout_s=5, name="step"):
    """Let each rank compare its facts; return what each raises, by rank."""
    coordinator = coordinator or Coordinator(len(facts))
    raised = {}

    def run(rank):
        names = name if isinstance(name, list) else [name] * len(facts)
        try:
            preflight.compare_facts(
                coordinator, rank, coordinator.world, "f/0/", names[rank], facts[rank], timeout_s
            )
        except RuntimeError as error:
            raised[rank] = error

    threads = [
        threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(facts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return raised


def text_of(raised, world):
    """Return the text that every rank raised alike."""
    assert sorted(raised) == list(range(world))
    assert {type(error) for error in raised.values()} == {MismatchError}
    (text,) = {str(error) for error in raised.values()}
    return text


def test_equal_facts_pass_with_three_calls_each():
    coordinator = Coordinator(3)
    facts = {"batch": "float32[8]", "collectives": ["a", "b"]}
    assert compare([facts] * 3, coordinator) == {}
    assert coordinator.calls == 9


def test_a_text_is_the_same_as_its_lines():
    assert compare([{"x": "a\nb"}, {"x": ["a", "b"]}]) == {}


def test_one_rank_differs_from_the_others():
    facts = [{"batch": ["x float32[8,4]", "y int32[8]"], "mesh": ["data=3"]} for _ in range(3)]
    facts[0]["batch"] = ["x float32[4,4]", "y int32[8]"]
    assert text_of(compare(facts), 3) == (
        "the ranks would run different programs: rank 0 differs from ranks 1 and 2\n"
        "batch:\n"
        "  --- ranks 1 and 2\n"
        "  +++ rank 0\n"
        "  -x float32[8,4]\n"
        "  +x float32[4,4]\n"
        "   y int32[8]\n" + REMEDY
    )


def test_of_two_halves_the_one_of_rank_0_is_the_reference():
    facts = [{"batch": str(rank % 2)} for rank in range(4)]
    assert text_of(compare(facts), 4) == (
        "the ranks would run different programs: ranks 1 and 3 differ from ranks 0 and 2\n"
        "batch:\n  --- ranks 0 and 2\n  +++ ranks 1 and 3\n  -0\n  +1\n" + REMEDY
    )


def test_different_programs_at_the_same_time():
    text = text_of(compare([{}, {}], name=["train_step", "eval_step"]), 2)
    assert "program:\n  --- rank 0\n  +++ rank 1\n  -train_step\n  +eval_step\n" in text


def test_a_fact_that_only_one_has():
    text = text_of(compare([{"a": "1"}, {}]), 2)
    assert "a:\n  --- rank 0\n  +++ rank 1\n  -1\n" in text


def test_ranks_that_all_differ_are_cut():
    text = text_of(compare([{"batch": str(rank)} for rank in range(7)]), 7)
    assert text == (
        "the ranks would run different programs: ranks 1, 2, 3, 4, 5 and 6 differ from rank 0\n"
        + "".join(
            f"rank {r} against rank 0:\nbatch:\n  --- rank 0\n  +++ rank {r}\n  -0\n  +{r}\n"
            for r in (1, 2, 3)
        )
        + "(3 more groups of ranks differ from all these)\n"
        + REMEDY
    )


def test_a_change_in_the_middle_of_many_lines():
    lines = [f"all-reduce {i}" for i in range(10_000)]
    facts = [{"collectives": lines}, {"collectives": [*lines[:5000], *lines[5001:]]}]
    assert text_of(compare(facts), 2) == (
        "the ranks would run different programs: rank 1 differs from rank 0\n"
        "collectives:\n  --- rank 0\n  +++ rank 1\n  (4998 lines are the same)\n"
        "   all-reduce 4998\n   all-reduce 4999\n  -all-reduce 5000\n   all-reduce 5001\n"
        "   all-reduce 5002\n" + REMEDY
    )


def test_two_changes_far_from_each_other():
    lines = [str(i) for i in range(20)]
    changed = ["-1", *lines[1:19], "+1"]
    rows = text_of(compare([{"x": lines}, {"x": changed}]), 2).splitlines()
    changes = ["-0", "+-1", " 1", " 2", "...", " 17", " 18", "-19", "++1"]
    assert rows[4:-1] == [f"  {change}" for change in changes]


def test_many_changes_are_cut():
    facts = [{"x": [f"{rank} {i}" for i in range(5000)]} for rank in range(2)]
    rows = text_of(compare(facts), 2).splitlines()
    assert rows[4:6] == ["  -0 0", "  -0 1"]
    assert rows[4 + preflight.MOST_LINES] == "  (and more)"


@pytest.mark.parametrize("longer", [0, 1])
def test_lines_at_the_end(longer):
    lines = [f"all-reduce {i}" for i in range(5)]
    facts = [{"collectives": lines[:4]}, {"collectives": lines[:4]}]
    facts[longer] = {"collectives": lines}
    sign = "-+"[longer]
    assert (
        "collectives:\n  --- rank 0\n  +++ rank 1\n  (2 lines are the same)\n   all-reduce 2\n"
        f"   all-reduce 3\n  {sign}all-reduce 4\n"
    ) in text_of(compare(facts), 2)


def test_the_text_is_bounded():
    facts = [
        {f"fact {k}": [f"{rank} {'x' * 5000} {i}" for i in range(500)] for k in range(3)}
        for rank in range(5)
    ]
    text = text_of(compare(facts), 5)
    assert len(text.splitlines()) < 300
    assert max(map(len, text.splitlines())) <= 2 + preflight.LONGEST_LINE


def test_a_rank_that_does_not_come_is_named():
    coordinator = Coordinator(3)
    raised = compare([{}, {}], coordinator, timeout_s=0.2)
    assert {str(error) for error in raised.values()} == {
        "the pre-flight of 'step' needs every rank, but rank 2 did not come within 0.2 s: see what "
        "it did meanwhile, or raise timeout_s= if it takes longer to load or compile"
    }
    with pytest.raises(RuntimeError) as late:
        preflight.compare_facts(coordinator, 2, 3, "f/0/", "step", {}, 0.2)
    assert str(late.value) == (
        "the pre-flight of 'step' needs every rank, but this one came after the others had waited "
        "for 0.2 s: see what it did meanwhile, or raise timeout_s= if it takes longer to load or "
        "compile"
    )


def test_a_rank_that_dies_before_it_tells_its_facts(monkeypatch):
    monkeypatch.setattr(preflight, "READ_S", 0.1)
    coordinator = Coordinator(2)
    coordinator.rows["f/0/digest/1"] = "another"
    coordinator.wait_at_barrier = lambda name, ms: None
    raised = compare([{"a": "1"}], coordinator)
    assert "a:\n  --- rank 0\n  +++ rank 1\n  -1\n" in str(raised[0])


def test_facts_of_a_program():
    mesh = jax.make_mesh((2, 1), ("data", "model"))
    shapes = {"x": np.zeros((8, 4), np.float16), "n": 3, "s": jax.ShapeDtypeStruct((), np.int32)}
    facts = preflight.facts_of(mesh, shapes, ["all-reduce float32 a.py:1"])
    assert facts["mesh"] == [
        "data=2, model=1",
        "device 0 cpu of rank 0",
        "device 1 cpu of rank 0",
    ]
    assert facts["shapes"] == ["['n'] int[]", "['s'] int32[]", "['x'] float16[8,4]"]
    assert facts["collectives"] == ["all-reduce float32 a.py:1"]
    assert f"jax {jax.__version__}" in facts["versions"]
    assert f"txcore {tx.__version__}" in facts["versions"]


@pytest.fixture
def run():
    """Run the ranks to their ends; none outlives the test."""
    started = []

    def run_all(world, **plan):
        started.extend(watch_run.start(world, WORKER, **plan))
        watch_run.finish(started)
        return started

    yield run_all
    watch_run.kill(started)


def refusals(ranks, kind="MismatchError"):
    """Return the text with which every rank refused; all have ended by that exception."""
    texts = set()
    for rank in ranks:
        (text,) = re.findall(rf"refused {kind} (.*)$", rank.out, re.M)
        texts.add(json.loads(text))
        assert rank.code == 1, rank.err
        assert f"{kind}: " in rank.err
        assert "Fatal Python error" not in rank.err
        assert not re.search(r"^txcore: (?!rank 0 has finished)", rank.err, re.M)
    (text,) = texts
    return text


@pytest.mark.slow
def test_real_ranks_that_are_equal(run):
    ranks = run(2, times=20)
    assert [rank.code for rank in ranks] == [0, 0], ranks[1].err
    median, _ = json.loads(re.findall(r"equal (.*)$", ranks[0].out, re.M)[0])
    assert median < 0.5  # measured: about 3 ms


@pytest.mark.slow
def test_real_ranks_with_different_versions(run):
    text = refusals(run(3, rank=1, differs={"jax": "0.9.0"}))
    assert text.startswith(
        "the ranks would run different programs: rank 1 differs from ranks 0 and 2\n"
        "versions:\n  --- ranks 0 and 2\n  +++ rank 1\n   python "
    )
    assert f"\n  -jax {jax.__version__}\n  +jax 0.9.0\n   jaxlib " in text


@pytest.mark.slow
def test_real_ranks_with_different_collectives_and_shapes(run):
    text = refusals(run(2, rank=1, differs={"order": "largest first", "rows": 16}))
    assert (
        "shapes:\n  --- rank 0\n  +++ rank 1\n  -['x'] float32[8,3]\n  +['x'] float32[16,3]\n"
        in text
    )
    changed = text.partition("collectives:\n")[2]
    assert (
        len(re.findall(r"^  [-+]all-reduce float32 .*preflight_worker.py:\d+$", changed, re.M)) >= 2
    )


@pytest.mark.slow
def test_a_real_rank_that_does_not_come(run):
    ranks = run(2, rank=1, differs={"late_s": 15}, timeout_s=1)
    assert "but rank 1 did not come within 1 s: " in ranks[0].err
    assert ranks[0].code != 0
    assert ranks[1].code != 0
