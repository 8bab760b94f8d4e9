"""Two processes without checkpoints: a signal stops both between two steps, and they say so."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from processes import finish, free_port

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(__file__).with_name("stopped_run.py")
SAID = (
    r"^txcore: SIGTERM on rank \d: stopped after (\d+) steps; nothing is saved without "
    r"checkpoints= \(the exception has the state\)$"
)


@pytest.mark.parametrize("where", ["step", "end"])
def test_a_signal_stops_all_ranks(where):
    coordinator = f"127.0.0.1:{free_port()}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, coordinator, str(rank), where],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    codes, _, errors = zip(*finish(*ranks, deadline_s=120), strict=True)
    assert codes == (143, 143), errors
    (steps,) = re.findall(SAID, errors[0], re.M)
    assert int(steps) == 3 if where == "end" else int(steps) >= 5
    assert "stopped" not in errors[1], "rank 0 says it"
