"""What the tests start is read together, and ends."""

import subprocess
import sys

import pytest
from processes import finish

SAYS_MUCH = (
    "import pathlib, sys; print('x' * 200_000, flush=True); pathlib.Path(sys.argv[1]).touch()"
)
WAITS = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
"""


def start(code, *args):
    command = [sys.executable, "-S", "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_rank_that_says_more_than_a_pipe_holds_keeps_no_other_waiting(tmp_path):
    """The first waits for the second, which waits until somebody reads what it says."""
    ranks = [start(code, tmp_path / "there") for code in (WAITS, SAYS_MUCH)]
    (first, *_), (second, said, _) = finish(*ranks, deadline_s=60)
    assert (first, second, len(said)) == (0, 0, 200_001)


def test_those_that_do_not_end_in_time_are_killed(tmp_path):
    ranks = [start(WAITS, tmp_path / "never"), start("pass")]
    with pytest.raises(subprocess.TimeoutExpired):
        finish(*ranks, deadline_s=1)
    assert ranks[0].poll() == -9
