"""`txcore launch --hosts`: ranks behind a remote shell, its words going through a shell or not."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from launched_cases import (
    REPORT,
    collect_reports,
    is_running,
    launch,
    start_launcher,
    wait_for_end,
    wait_for_pids,
    write_script,
)

from txcore.launch.launcher import hosts, supervise

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tested on Linux")

# As `ip netns exec` runs a command, and as ssh does: by a shell, elsewhere, with little around it.
DIRECT = 'exec "$@"'
BY_SHELL = 'cd / && exec env -i PATH="$PATH" sh -c "$*"'
COORDINATOR = ["--coordinator", "127.0.0.1:23456"]
WRITES_PID = (
    "folder, rank = sys.argv[1], os.environ['JAX_PROCESS_ID']\n"
    "open(f'{folder}/pid-{rank}', 'w').write(f'{os.getpid()}\\n')\n"
)


@pytest.fixture(params=[DIRECT, BY_SHELL], ids=["direct", "by_shell"])
def remote(request, tmp_path):
    """Return the options for two hosts, a and b, behind a fake remote shell."""
    path = tmp_path / "remote-shell"
    path.write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/reached\nshift\n{request.param}\n")
    path.chmod(0o755)
    return ["--remote-shell", path, "--hosts", "a,b", *COORDINATOR]


def test_ranks_are_told_their_places(remote, tmp_path):
    found = collect_reports("-n", 3, *remote, REPORT)
    places = ("JAX_PROCESS_ID", "JAX_LOCAL_PROCESS_ID", "JAX_NUM_PROCESSES")
    assert [[r["env"][name] for name in places] for r in found] == [
        ["0", "0", "3"],
        ["1", "1", "3"],
        ["2", "0", "3"],
    ]
    assert {r["env"]["JAX_COORDINATOR_ADDRESS"] for r in found} == {"127.0.0.1:23456"}
    assert sorted((tmp_path / "reached").read_text().split()) == ["a", "a", "b"]


def test_words_variables_and_folder_arrive_as_they_are(remote, tmp_path):
    words = ["a b", "", "*", "$HOME", "`id`", "ü\n'\"\\", "--hosts"]
    folder = tmp_path / "with ' and space"
    folder.mkdir()
    changes = {"XLA_FLAGS": "--a='b c' $x \n\"", "OWN": "$(id) '", "OTHER": "not asked for"}
    found = collect_reports(
        "-n", 2, *remote, "-x", "OWN", REPORT, *words, changes=changes, cwd=folder
    )
    for report in found:
        assert report["argv"] == words
        assert report["cwd"] == str(folder)
        assert report["executable"] == sys.executable
        assert report["env"]["XLA_FLAGS"] == changes["XLA_FLAGS"]
        assert report["env"]["OWN"] == changes["OWN"]


def test_what_is_not_asked_for_stays_here(tmp_path):
    path = tmp_path / "remote-shell"
    path.write_text(f"#!/bin/sh\nshift\n{BY_SHELL}\n")
    path.chmod(0o755)
    where = ["--remote-shell", path, "--hosts", "a", *COORDINATOR]
    (report,) = collect_reports("-n", 1, *where, REPORT, changes={"OTHER": "not asked for"})
    assert "OTHER" not in report["env"]


def test_cores_and_gpus_are_those_of_the_host(remote):
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    changes = {"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": "3,4"}
    first, second, third = collect_reports("-n", 3, *remote, REPORT, changes=changes)
    assert set(third["cores"]) == allowed
    assert len(first["cores"]) == len(second["cores"]) == len(allowed) // 2
    assert not {*first["cores"]} & {*second["cores"]}
    if DIRECT in remote[1].read_text():
        found = [r["env"]["CUDA_VISIBLE_DEVICES"] for r in (first, second, third)]
        assert found == ["3", "4", "3,4"]


def test_this_host_needs_no_remote_shell(remote, tmp_path):
    for own in ("localhost", "127.0.0.1", socket.gethostname()):
        remote[3] = f"{own},b"
        assert len(collect_reports("-n", 2, *remote, REPORT)) == 2
    assert (tmp_path / "reached").read_text() == "b\n" * 3


def test_the_first_host_has_the_coordinator(remote):
    (report,) = collect_reports("-n", 1, *remote[:2], "--hosts", "u@127.0.0.2", REPORT)
    address, _, port = report["env"]["JAX_COORDINATOR_ADDRESS"].rpartition(":")
    assert address == "127.0.0.2"
    assert 20000 <= int(port) < 2**16
    assert report["env"]["JAX_COORDINATOR_BIND_ADDRESS"] == f"127.0.0.2:{port}"


def test_this_host_as_the_first_is_known_by_the_address_that_the_others_see(remote):
    found = collect_reports("-n", 2, *remote[:2], "--hosts", "localhost,127.0.0.2", REPORT)
    (address,) = {r["env"]["JAX_COORDINATOR_ADDRESS"] for r in found}
    assert address.startswith("127.0.0.1:")


def test_output_and_exit_code(remote, tmp_path):
    fails = write_script(
        tmp_path,
        """
        print("out", file=sys.stdout)
        print("x" * 2**20, file=sys.stderr)
        if os.environ["JAX_PROCESS_ID"] == "1":
            sys.stdout.write("the last words")
            while not os.path.exists("wrote"):
                time.sleep(0.01)
            sys.exit(7)
        open("wrote", "w")
        time.sleep(60)
        """,
    )
    done = launch("-n", 2, *remote, fails, cwd=tmp_path)
    assert sorted(done.stdout.splitlines()) == ["[0] out", "[1] out", "[1] the last words"]
    *lines, last = done.stderr.splitlines()
    assert sorted(lines) == ["[0] " + "x" * 2**20, "[1] " + "x" * 2**20]
    assert (last, done.returncode) == ("txcore: rank 1 (on b) ended with exit code 7", 7)


def test_files_are_here(remote, tmp_path):
    text = (
        "print('out'); print('err', file=sys.stderr); sys.exit(int(os.environ['JAX_PROCESS_ID']))"
    )
    done = launch("-n", 2, *remote, "--output-dir", tmp_path / "logs", write_script(tmp_path, text))
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [
        "rank-0.err",
        "rank-0.out",
        "rank-1.err",
        "rank-1.out",
    ]
    assert (tmp_path / "logs" / "rank-1.out").read_text() == "out\n"
    assert done.returncode == 1
    # Rank 0 ends with 0, before rank 1 or after it.
    early = "(; rank 0 had ended with exit code 0 before)?"
    last = rf"txcore: rank 1 \(on b\) ended with exit code 1{early}"
    assert re.fullmatch(rf"\[1\] err\n{last}\n", done.stderr), done.stderr


def test_a_killed_rank_ends_the_rest(remote, tmp_path):
    idle = write_script(tmp_path, WRITES_PID + "time.sleep(60)")
    with start_launcher("-n", 3, *remote, idle, tmp_path) as launcher:
        pids = wait_for_pids(tmp_path, 3)
        os.kill(pids[2], signal.SIGKILL)
        _, err = launcher.communicate(timeout=30)
    assert err == "txcore: rank 2 (on b) was killed by SIGKILL\n"
    assert (launcher.returncode, any(map(is_running, pids))) == (137, False)


def test_signals_reach_ranks(remote, tmp_path):
    text = """
        def handle(number, _):
            print(signal.Signals(number).name)
            if number == signal.SIGTERM:
                sys.exit(0)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, handle)
    """
    tells = write_script(tmp_path, text)
    tells.write_text(tells.read_text() + WRITES_PID + "while True: time.sleep(0.1)")
    with start_launcher("-n", 2, *remote, tells, tmp_path) as launcher:
        wait_for_pids(tmp_path, 2)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            launcher.send_signal(number)
            time.sleep(0.3)
        out, err = launcher.communicate(timeout=30)
    assert sorted(out.splitlines()) == [f"[{r}] SIG{n}" for r in range(2) for n in ("TERM", "USR1")]
    assert (launcher.returncode, err) == (0, "")


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(remote, tmp_path):
    ignores = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WRITES_PID + "time.sleep(60)"
    with start_launcher(
        "-n", 2, "--grace", 1, *remote, write_script(tmp_path, ignores), tmp_path
    ) as launcher:
        pids = wait_for_pids(tmp_path, 2)
        launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=30)
    says = r"txcore: after SIGTERM from outside rank \d \(on [ab]\) was killed by SIGKILL\n"
    assert re.fullmatch(says, err)
    assert (launcher.returncode, any(map(is_running, pids))) == (137, False)


def test_a_killed_launcher_leaves_nothing(remote, tmp_path):
    ignores = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WRITES_PID + "time.sleep(60)"
    with start_launcher("-n", 2, *remote, write_script(tmp_path, ignores), tmp_path) as launcher:
        pids = wait_for_pids(tmp_path, 2)
        launcher.kill()
        wait_for_end(pids)


def test_a_killed_far_end_leaves_nothing(remote, tmp_path):
    idle = write_script(tmp_path, WRITES_PID + "print(os.getppid())\ntime.sleep(60)")
    with start_launcher("-n", 2, *remote, idle, tmp_path) as launcher:
        pids = wait_for_pids(tmp_path, 2)
        far_end = int(launcher.stdout.readline().partition("] ")[2])
        os.kill(far_end, signal.SIGKILL)
        wait_for_end(pids)
        assert launcher.wait(30) == 137


def test_a_connection_that_does_not_end_is_given_up(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(supervise, "_DEAD_S", 0.4)
    path = tmp_path / "remote-shell"
    path.write_text(f"#!/bin/sh\ntrap '' TERM\necho $$ > {tmp_path}/pid-0\nsleep 60\n")
    path.chmod(0o755)
    stuck, fails = hosts.Task(0, ["true"], host="a"), hosts.Task(1, ["sh", "-c", "sleep 1; exit 3"])
    failure = supervise.launch_ranks([stuck, fails], remote_shell=[str(path)], grace_s=0.1)
    assert (failure.rank, failure.exit_code) == (1, 3)
    assert capfd.readouterr().err == "txcore: rank 0 (on a) outlives SIGKILL by 0.4 s\n"
    wait_for_end(wait_for_pids(tmp_path, 1))


def test_a_host_that_lacks_the_folder_or_the_gpus(remote, tmp_path):
    where = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    gone = tmp_path / "gone"
    gone.mkdir()
    path = remote[1]
    path.write_text(path.read_text().replace("shift\n", f"rm -rf {gone}\nshift\n"))
    done = launch("-n", 1, *remote, "true", cwd=gone)
    says = (
        f"txcore: rank 0 cannot start on {where}: [Errno 2] No such file or directory: '{gone}'\n"
    )
    assert done.stderr == f"{says}txcore: rank 0 (on a) ended with exit code 127\n"
    assert done.returncode == 127


def test_ssh_says_why_there_is_no_connection(tmp_path):
    if shutil.which("ssh") is None:
        pytest.skip("ssh is not installed")
    done = launch("-n", 1, "--hosts", "127.0.0.2", "true")  # where nobody listens
    *_, said, last = done.stderr.splitlines()
    assert "ssh: connect to host 127.0.0.2 port 22" in said
    assert (last, done.returncode) == (
        "txcore: rank 0 (on 127.0.0.2) ended with exit code 255",
        255,
    )


def test_a_path_that_a_shell_would_change_is_refused(monkeypatch, capfd):
    from txcore import cli

    monkeypatch.setattr(sys, "executable", "/opt/my python/bin/python")
    line = ["launch", "-n", "1", "--hosts", "a", "--remote-shell", "env", *COORDINATOR, "true"]
    assert cli.main(line) == 2
    assert capfd.readouterr().err == (
        "txcore: error: --hosts needs a path without spaces and such, but Python's is "
        "/opt/my python/bin/python\n"
    )
