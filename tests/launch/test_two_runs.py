"""Two runs at once on one coordinator's port: one goes on, the other is refused in seconds."""

import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
from joining import clean_environment
from launched_cases import command
from machine import within
from processes import finish, free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the port is held on Linux")
SWEEP = pytest.mark.skipif(
    os.environ.get("TXCORE_ALL_RANKS") != "1", reason="a sweep: set TXCORE_ALL_RANKS=1"
)
SCRIPT = pathlib.Path(__file__).with_name("bad_day.py")
WORK = ("--work", 8)  # longer than the other run tries to start
SUMS = {2: "sum [11.0]", 3: "sum [111.0]"}
BOUND_S = 40  # for a start, a refusal and an end where several runs share two cores


def run(argv, environment):
    return subprocess.Popen(
        [*map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(**environment),
    )


def start_by_hand(port, size, *args, **more):
    """Start the ranks of a run by what a person sets."""
    common = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(size)}
    argv = [sys.executable, SCRIPT, *WORK, *args]
    return [run(argv, common | more | {"JAX_PROCESS_ID": str(rank)}) for rank in range(size)]


def start_launcher(port, size):
    return run(command("--coordinator", f"127.0.0.1:{port}", "-n", size, SCRIPT, *WORK), {})


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=SWEEP)])
def test_of_two_runs_that_start_at_once_one_is_refused(size):
    """The second process of one may come first to the other: it has another run's name."""
    port = free_port()
    runs = {name: start_by_hand(port, size, TXCORE_RUN=name) for name in "ab"}
    ended = finish(*runs["a"], *runs["b"])
    by_run = {"a": ended[:size], "b": ended[size:]}
    won = [name for name, ranks in by_run.items() if ranks[0][0] == 0]
    assert len(won) == 1, ended
    assert all(code == 0 and SUMS[size] in out for code, out, _ in by_run[won[0]]), ended
    (lost,) = {*by_run} - {*won}
    reason = f"the port is that of run {won[0]} (process 0 on "
    assert all(code == 1 and reason in err for code, _, err in by_run[lost]), ended
    assert all(f"is of run {lost}: give each run a port of its own" in e for *_, e in by_run[lost])
    waited = [int(re.findall(r"waited (\d+) s", err)[0]) for *_, err in by_run[lost]]
    assert within(max(waited), 16)


@SWEEP
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("attempt", range(3))
def test_of_two_launchers_on_one_port_one_is_refused(attempt, size):
    port = free_port()
    ended = finish(*(start_launcher(port, size) for _ in range(2)))
    assert sorted(code for code, *_ in ended) != [1, 1], ended
    lost, won = sorted(ended, key=lambda each: each[0] == 0)
    assert (won[0], won[1].count(SUMS[size])) == (0, size), ended
    # The launcher itself may find the port taken, before it starts any rank.
    assert lost[0] in (1, 2)
    assert "the port is that of run " in lost[2] or "rank 0 cannot listen there" in lost[2], lost


@SWEEP
@pytest.mark.parametrize("size", [2, 3])
def test_runs_that_nobody_named_form_one_and_the_rest_is_refused(size):
    port = free_port()
    begun = time.monotonic()
    ended = finish(*start_by_hand(port, size), *start_by_hand(port, size))
    assert within(time.monotonic() - begun, BOUND_S)
    good = [out for code, out, _ in ended if code == 0]
    assert [SUMS[size] in out for out in good] == [True] * size, ended
    refused = [err for code, _, err in ended if code == 1]
    assert len(refused) == size, ended
    assert all("and each run a port of its own" in err for err in refused), ended


@SWEEP
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", [None, "b"])
def test_a_run_that_comes_to_one_under_way_is_refused(name, size):
    port = free_port()
    first = start_by_hand(port, size, "--work", 25)
    for rank in first:
        next(line for line in rank.stdout if line.startswith("joined"))
    begun = time.monotonic()
    ended = finish(*start_by_hand(port, size, **({"TXCORE_RUN": name} if name else {})))
    assert within(time.monotonic() - begun, BOUND_S)
    reason = "the port is that of a run without an id" if name else "is taken by a process on"
    assert all(code == 1 and reason in err for code, _, err in ended), ended
    assert all(code == 0 and SUMS[size] in out for code, out, _ in finish(*first))


@SWEEP
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "odd, says",
    [
        ({"JAX_NUM_PROCESSES": "4"}, "was started with num_processes=4, but process 0"),
        ({"JAX_PROCESS_ID": "0"}, "process_id=0 is taken by a process on"),
    ],
)
def test_ranks_that_are_told_differently(odd, says, named, size):
    """Where the run has a name all end at once; else the one refused at once, and the rest soon."""
    port = free_port()
    common = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(size)}
    common |= {"TXCORE_RUN": "mine"} if named else {}
    own = [{"JAX_PROCESS_ID": str(rank)} for rank in range(size)]
    own[size - 1] |= odd
    begun = time.monotonic()
    ended = finish(*(run([sys.executable, SCRIPT], common | each) for each in own))
    seconds = time.monotonic() - begun
    assert within(seconds, 30 if named else 60), seconds
    assert all(code == 1 and says in err for code, _, err in ended), ended
    print(f"{size} ranks, {odd}, {'named' if named else 'without a name'}: {seconds:.1f} s")
