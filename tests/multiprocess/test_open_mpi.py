"""Runs that Open MPI's mpirun starts."""

import subprocess
import sys

import pytest
from cluster_cases import FLAGS, ROOT, TRAIN, WORKER, curve, curve_by_hand, environment, need, words

pytestmark = pytest.mark.slow
# By itself mpirun binds a process to a core: fewer threads, which round differently.
OPTIONS = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
OPTIONS += ["--mca", "oob_tcp_if_include", "lo"]
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # as in /proc/net/tcp and tcp6


def mpirun(*command):
    need(["mpirun"], ["openmpi-bin"])
    done = subprocess.run(
        ["mpirun", *OPTIONS, "-n", "2", sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_mpirun():
    seen = words(mpirun(WORKER))
    assert [s["sum"] for s in seen] == [[11.0], [11.0]]
    assert [s["position"] for s in seen] == [0, 1]
    assert {a.partition(":")[0] for s in seen for a in s["listening_with_backend"]} <= LOOPBACK


def test_mpirun_gives_the_curve_of_processes_started_by_hand(tmp_path):
    out = mpirun(TRAIN, *FLAGS, "--results", tmp_path / "results.json")
    assert "2 process(es)" in out
    assert curve(tmp_path / "results.json") == curve_by_hand()
