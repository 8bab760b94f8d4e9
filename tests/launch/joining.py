"""Start processes that join by tx.initialize, and collect what they say."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(__file__).with_name("worker.py")
PLACE = ("JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM", "OMPI_")
TORCH = ("MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_")
DROPPED = (*PLACE, *TORCH, "XLA_FLAGS", "NCCL_SOCKET", "GLOO_SOCKET")


def clean_environment(**more):
    """Return this process's environment without what says where a process belongs."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(DROPPED)}
    return own | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | more


def start(arguments=None, script=WORKER, **environment):
    """Start a process; arguments are worker.py's."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", script, json.dumps(arguments or {})],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(**environment),
    )


def place(port, size, rank, **more):
    """Return the arguments of one process of a run on loopback."""
    own = {"coordinator": f"127.0.0.1:{port}", "num_processes": size, "process_id": rank}
    return own | {"timeout_s": 60} | more


def said(ended):
    """Return what a process that ended well has said."""
    code, out, err = ended
    assert code == 0, err
    # gloo greets on stdout too: ours is the last line
    return json.loads(out.splitlines()[-1])


def refused(ended):
    """Return the message of the exception that ended a process."""
    code, _, err = ended
    assert code == 1, err
    return err.strip().splitlines()[-1]
