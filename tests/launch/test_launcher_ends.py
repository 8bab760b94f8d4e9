"""`txcore launch` with real ranks: how soon all end where one has a bad day, and who is named."""

import os
import pathlib
import re
import sys
import time

import pytest
from launched_cases import launch
from machine import within

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tested on Linux")
SWEEP = pytest.mark.skipif(
    os.environ.get("TXCORE_ALL_RANKS") != "1", reason="a sweep: set TXCORE_ALL_RANKS=1"
)
SCRIPT = pathlib.Path(__file__).with_name("bad_day.py")
# A rank tells where it is about once a second: one that stops in its first has not told anything.
AT = r"(?:; last seen at step \d+ \(.+\))?"
SILENT = (
    rf"rank R has not been heard of for \d+ s: killed, stopped, or cut off from the network{AT}"
)
LEFT = (
    r"rank R (ended the program at step 25 \(data\), but .* for it in step 25: every rank .*"
    rf"|ended with exit code 0{AT})"
)
# What rank R does; the last line, O for another one; the code; seconds from there to the end.
CASES = {
    "kill": (r"rank R \(pid P\) was killed by SIGKILL", 137, 6),
    "stop": (rf"{SILENT}; so rank O \(pid P\) ended with exit code 75", 75, 30),
    "hold": (rf"{SILENT}; so rank O \(pid P\) ended with exit code 75", 75, 30),
    "raise": (r"rank R \(pid P\) ended with exit code 1", 1, 10),
    "leave": (rf"{LEFT}; so rank O \(pid P\) ended with exit code 70", 70, 22),
    "term": (
        r"SIGTERM on rank R: stopped after \d+ steps; so rank \d \(pid P\) ended with exit code "
        "143",
        143,
        10,
    ),
}
ALWAYS = {("kill", 2, 1)}


PLACES = [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
SWEPT = [
    pytest.param(kind, size, rank, marks=[] if (kind, size, rank) in ALWAYS else SWEEP)
    for kind in CASES
    for size, rank in PLACES
]


def last_line(text):
    return re.sub(r"\(pid \d+\)", "(pid P)", text.splitlines()[-1])


@pytest.mark.parametrize("kind, size, rank", SWEPT)
def test_the_last_line_names_the_rank_that_had_a_bad_day(kind, size, rank):
    pattern, code, seconds = CASES[kind]
    done = launch("-n", size, SCRIPT, "--odd", kind, "--rank", rank, timeout=90)
    ended = time.time()
    said = last_line(done.stderr)
    expected = re.sub(r"\bO\b", "[0-2]", re.sub(r"\bR\b", str(rank), pattern))
    assert re.fullmatch(f"txcore: (?:{expected})", said), done.stderr
    assert done.returncode == code
    since = ended - float(re.findall(r"^\[\d\] bad (\S+)", done.stdout, re.M)[0])
    print(f"{kind} of rank {rank} of {size}: {since:.1f} s; {said}")
    assert since < seconds


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=SWEEP)])
@pytest.mark.parametrize("kind", ["exit 0", pytest.param("exit 2", marks=SWEEP)])
def test_a_rank_that_ends_before_it_joins(kind, size):
    """It refuses its arguments, or prints its help: nobody waits for it in the meeting."""
    begun = time.monotonic()
    done = launch("-n", size, SCRIPT, "--odd", kind, "--rank", size - 1)
    assert within(time.monotonic() - begun, 25)
    if kind == "exit 0":
        met = f"process {size - 1} ended with exit code 0 before all had met: see what it says"
        assert done.stderr.count(met) == size - 1
        assert re.fullmatch(
            rf"txcore: rank \d \(pid P\) ended with exit code 1; rank {size - 1} had ended with "
            "exit code 0 before",
            last_line(done.stderr),
        )
    else:
        expected = f"txcore: rank {size - 1} (pid P) ended with exit code 2"
        assert last_line(done.stderr) == expected


@SWEEP
def test_a_rank_that_is_slow_to_start_is_waited_for():
    done = launch("-n", 2, SCRIPT, "--odd", "late")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum [11.0]") == 2
