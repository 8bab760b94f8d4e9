"""What the tests on real clusters share: tools that are installed, ranks, and loss curves."""

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from processes import finish, free_port

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "launch" / "worker.py"
TRAIN = ROOT / "examples" / "mnist" / "train.py"
STEPS = 12
# Small, and the same numbers wherever it runs; one device a process.
FLAGS = (
    f"--model cnn --dataset digits --batch-size 32 --steps {STEPS} --warmup 2 --no-audit".split()
)
PLACE = ("JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM", "OMPI_", "XLA_FLAGS")
TORCH = ("MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_")


def need(tools, packages):
    """Have commands, installed by Debian's apt if TXCORE_CLUSTER_TESTS=1 says so, or skip."""
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [tool for tool in tools if shutil.which(tool, path=search) is None]
    if missing and os.environ.get("TXCORE_CLUSTER_TESTS") == "1":
        reason = _install(tuple(packages))
        missing = [tool for tool in tools if shutil.which(tool, path=search) is None]
        assert not missing, f"{', '.join(missing)} not there after installing: {reason}"
    if missing:
        pytest.skip(
            f"{', '.join(missing)} not installed: apt-get install {' '.join(packages)}, or set "
            "TXCORE_CLUSTER_TESTS=1 as root"
        )


@functools.cache
def _install(packages):
    """Install Debian packages; return what went wrong."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    for command in (["apt-get", "update", "-qq"], install):
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=240
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode != 0:
            return done.stderr
    return ""


def need_root():
    """Skip for users that may not start daemons or make namespaces."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


def environment(**more):
    """Return this process's environment without what says where a process belongs."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(PLACE + TORCH)}
    return own | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | more


def words(text):
    """Return what the processes said as JSON, by rank."""
    # mpirun may lose the end of a line.
    starts = [found.start() for found in re.finditer(r'\{"joined_in_s"', text)]
    said = [json.JSONDecoder().raw_decode(text, start)[0] for start in starts]
    return sorted(said, key=lambda each: each["position"])


def curve(path):
    """Return the loss curve that --results wrote."""
    return json.loads(pathlib.Path(path).read_text())["loss_curve"]


@functools.cache
def curve_by_hand(steps=STEPS, *more):
    """Return the loss curve of two processes that are started by hand, with flags."""
    results = pathlib.Path(os.environ.get("TMPDIR", "/tmp")) / f"by-hand-{os.getpid()}.json"
    port = free_port()
    place = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
    flags = [*FLAGS, *more, "--steps", steps, "--results", results]
    ranks = [
        subprocess.Popen(
            [str(word) for word in (sys.executable, TRAIN, *flags, *place, rank)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    codes, texts, _ = zip(*finish(*ranks, deadline_s=300), strict=True)
    assert codes == (0, 0), texts
    losses = curve(results)
    results.unlink()
    assert len(losses) == steps
    return losses
