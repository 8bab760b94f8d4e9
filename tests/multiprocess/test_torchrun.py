"""Processes that torchrun starts join by its variables; where PyTorch is installed."""

import importlib.util
import json
import subprocess
import sys

import pytest
from cluster_cases import WORKER, environment
from processes import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None,
        reason="torchrun is not here: pip install torch (a CPU one does)",
    ),
]


@pytest.mark.parametrize("rendezvous", ["--standalone", "--master-port", "c10d"])
def test_two_processes_sum_over_both(rendezvous):
    where = {
        "--standalone": ["--standalone"],
        "--master-port": ["--master-port", str(free_port())],
        "c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"],
    }[rendezvous]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", "2", WORKER],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted((s["position"], s["size"], *s["sum"]) for s in seen) == [(0, 2, 11), (1, 2, 11)]
