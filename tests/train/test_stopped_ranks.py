"""Two processes without checkpoints: a signal stops both between two steps, and they say so."""

import pathlib
import re

import pytest
from processes import finish, start_ranks

WORKER = pathlib.Path(__file__).with_name("stopped_run.py")
SAID = (
    r"^txcore: SIGTERM on rank \d: stopped after (\d+) steps; nothing is saved without "
    r"checkpoints= \(the exception has the state\)$"
)


@pytest.mark.parametrize("where", ["step", "end"])
def test_a_signal_stops_all_ranks(where):
    ranks = start_ranks(WORKER, where)
    codes, _, errors = zip(*finish(*ranks, deadline_s=120), strict=True)
    assert codes == (143, 143), errors
    (steps,) = re.findall(SAID, errors[0], re.M)
    assert int(steps) == 3 if where == "end" else int(steps) >= 5
    assert "stopped" not in errors[1], "rank 0 says it"
