"""Runs under a real SLURM, started for them: what is detected, the batch script, and restarts."""

import json
import os
import signal
import sys
import time

import pytest
from cluster_cases import FLAGS, ROOT, WORKER, curve, curve_by_hand, need, need_root, words
from namespaces import ADDRESSES, NAMES, two_hosts
from slurm_cases import started

BATCH = ROOT / "examples" / "slurm" / "mnist.sbatch"
TELL = "from txcore import launch; print('cluster:', launch.cluster())"
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # as in /proc/net/tcp and tcp6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    need_root()
    need(["slurmctld", "slurmd", "srun", "sbatch"], ["slurm-wlm"])
    with started(tmp_path_factory.mktemp("slurm") / "m") as slurm:
        yield slurm


def submit(slurm, folder, *script, **environment):
    """Submit a batch script; return the job's number and where its output goes."""
    log = folder / "job.log"
    done = slurm.run("sbatch", "--parsable", "-o", log, *script, cwd=ROOT, **environment)
    return done.stdout.strip(), log


def submit_mnist(slurm, folder, *arguments):
    """Submit the example."""
    environment = {"TXCORE_PYTHON": sys.executable, "TXCORE_CHECKPOINTS": str(folder / "saved")}
    script = [BATCH, *FLAGS, "--results", folder / "results.json", *arguments]
    return submit(slurm, folder, *script, **environment)


def wait_for(slurm, number, log, reached, seconds=300):
    """Wait until something holds, and return the job's record and output."""
    deadline = time.monotonic() + seconds
    while True:
        record = slurm.job(number)
        text = log.read_text() if log.exists() else ""
        if reached(record, text):
            return record, text
        state = {k: record[k] for k in ("JobState", "Reason", "ExitCode", "Restarts")}
        assert time.monotonic() < deadline, f"{state}\n{text}\n{slurm.log()}"
        time.sleep(0.1)


def has_ended(record, _):
    return record["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def test_srun(slurm):
    seen = words(slurm.run("srun", "-n", 2, sys.executable, WORKER, cwd=ROOT).stdout)
    assert [s["sum"] for s in seen] == [[11.0], [11.0]]
    assert [s["position"] for s in seen] == [0, 1]
    assert {a.partition(":")[0] for s in seen for a in s["listening_with_backend"]} <= LOOPBACK


def test_two_steps_of_a_job_at_once(slurm, tmp_path):
    step = f"srun --exact -n 2 {sys.executable} {WORKER}"
    script = tmp_path / "two"
    script.write_text(f"#!/bin/sh\n{step} > {tmp_path}/a &\n{step} > {tmp_path}/b\nwait\n")
    job, log = submit(slurm, tmp_path, "-n", 4, script)
    _, text = wait_for(slurm, job, log, has_ended)
    for name in "ab":
        seen = words((tmp_path / name).read_text())
        assert [s["sum"] for s in seen] == [[11.0], [11.0]], text


@pytest.mark.parametrize("way", ["salloc", "sbatch"])
def test_a_shell_in_a_job_is_no_process_of_a_run(slurm, way, tmp_path):
    if way == "salloc":
        out = slurm.run("salloc", "-n", 2, sys.executable, "-c", TELL, cwd=ROOT).stdout
    else:
        script = tmp_path / "tell"
        script.write_text(f'#!/bin/sh\n{sys.executable} -c "{TELL}"\n')
        job, log = submit(slurm, tmp_path, "-n", 2, script)
        _, out = wait_for(slurm, job, log, has_ended)
    assert "cluster: None" in out


def test_sbatch_gives_the_curve_of_processes_started_by_hand(slurm, tmp_path):
    job, log = submit_mnist(slurm, tmp_path)
    record, text = wait_for(slurm, job, log, has_ended)
    assert record["JobState"] == "COMPLETED", text
    assert "2 process(es)" in text
    assert curve(tmp_path / "results.json") == curve_by_hand()


def test_an_own_error_is_no_reason_to_start_again(slurm, tmp_path):
    job, log = submit_mnist(slurm, tmp_path, "--batch-size", "33")
    record, text = wait_for(slurm, job, log, has_ended)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "2:0"), text
    assert record["Restarts"] == "0"
    assert "--batch-size 33 cannot be shared equally by 2 devices" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_cut_off_goes_on_by_itself(slurm, tmp_path, number):
    """SIGTERM to all tasks, as before the time limit; or SIGKILL to one."""
    steps, cut, every = 200, 45, 10  # 45: the first evaluation, which is printed
    job, log = submit_mnist(slurm, tmp_path, "--steps", steps, "--save-every", every)
    wait_for(slurm, job, log, lambda _, text: f" {cut}/{steps} " in text)
    if number == signal.SIGTERM:
        slurm.run("scancel", "--signal=TERM", job)
    else:
        tasks = slurm.run("scontrol", "listpids", f"{job}.0").stdout.splitlines()[1:]
        os.kill(int(tasks[1].split()[0]), number)
    record, text = wait_for(slurm, job, log, has_ended)
    assert record["JobState"] == "COMPLETED", text
    assert record["Restarts"] == "1"
    code = {signal.SIGTERM: 143, signal.SIGKILL: 137}[number]
    assert f"mnist.sbatch: exit code {code}, restart 1 of 3" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert cut - every <= results["first_step"] - 1 < steps
    assert results["loss_curve"] == curve_by_hand(steps)[results["first_step"] - 1 :]


def test_two_nodes(tmp_path):
    """One task on each of two hosts (network namespaces), with addresses and names of their own."""
    need_root()
    need(["slurmctld", "slurmd", "srun", "ip"], ["slurm-wlm", "iproute2"])
    nodes = list(zip(NAMES, ADDRESSES, strict=True))
    with two_hosts(tmp_path) as hosts, started(tmp_path / "m", nodes, hosts.command) as slurm:
        out = slurm.run("srun", "-N", 2, "-n", 2, sys.executable, WORKER, cwd=ROOT).stdout
    seen = words(out)
    assert [s["sum"] for s in seen] == [[11.0], [11.0]]
    own = [{a.partition(":")[0][-8:] for a in s["listening_with_backend"]} for s in seen]
    assert own == [{"0100CB0A"}, {"0200CB0A"}]
