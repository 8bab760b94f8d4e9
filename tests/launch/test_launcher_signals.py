"""`txcore launch`: which signals reach the ranks, how often, and what ends ranks that stay."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from launched_cases import (
    command,
    environment,
    is_running,
    start_launcher,
    wait_for_end,
    wait_for_pids,
    wait_until,
    write_script,
)
from machine import within

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tested on Linux")

# Say which signals come; end some time after the first that ends a run.
COUNTS = """
    import collections
    rank = os.environ["JAX_PROCESS_ID"]
    seen, ending = [], []

    def handle(number, _):
        seen.append(signal.Signals(number).name)
        if number not in (signal.SIGUSR1, signal.SIGUSR2):
            ending.append(time.monotonic())
        print(seen[-1])

    for name in ("INT", "TERM", "HUP", "USR1", "USR2"):
        signal.signal(getattr(signal, "SIG" + name), handle)
    signal.alarm(60)  # for a test that reads in vain
    open(os.path.join({folder!r}, f"pid-{{rank}}"), "w").write(f"{{os.getpid()}}\\n")
    while not ending or time.monotonic() < ending[0] + {stays_s}:
        time.sleep(0.05)
    sys.exit({code})
"""


@contextlib.contextmanager
def counting(folder, *options, stays_s=1.0, code=0, **more):
    """Start two ranks that count signals; yield the launcher and their pids once they can."""
    text = COUNTS.format(folder=str(folder), stays_s=stays_s, code=code)
    with start_launcher("-n", 2, *options, write_script(folder, text), **more) as launcher:
        yield launcher, wait_for_pids(folder, 2)


def lines(*signals):
    return sorted(f"[{rank}] {name}" for rank in range(2) for name in signals)


def wait_for_lines(launcher, name):
    """Read what each rank says of a signal."""
    assert sorted(launcher.stdout.readline().rstrip() for _ in range(2)) == lines(name)


WAITING = r"txcore: waiting \d+ s for rank [01](, 1)? to end\r?\n"  # for a rank that is slow


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_is_forwarded_once(tmp_path, name):
    with counting(tmp_path) as (launcher, _):
        launcher.send_signal(getattr(signal, name))
        wait_for_lines(launcher, name)
        if name != "SIGINT":  # of which the second kills
            launcher.send_signal(getattr(signal, name))
        out, err = launcher.communicate(timeout=30)
    assert (launcher.returncode, out, re.sub(WAITING, "", err)) == (0, "", "")


def test_an_exit_code_after_a_signal_is_kept(tmp_path):
    with counting(tmp_path, code=9) as (launcher, pids):
        launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=30)
    says = "txcore: after SIGTERM from outside rank {} (pid {}) ended with exit code 9\n"
    assert re.sub(WAITING, "", err) in [says.format(*rank) for rank in enumerate(pids)]
    assert launcher.returncode == 9


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ranks_without_handlers(tmp_path, name):
    text = """
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        open(sys.argv[1] + os.environ["JAX_PROCESS_ID"], "w").write(f"{os.getpid()}\\n")
        time.sleep(60)
    """
    idle = write_script(tmp_path, text)
    with start_launcher("-n", 2, idle, tmp_path / "pid-") as launcher:
        pids = wait_for_pids(tmp_path, 2)
        launcher.send_signal(getattr(signal, name))
        _, err = launcher.communicate(timeout=30)
    says = f"txcore: after {name} from outside rank {{}} (pid {{}}) was killed by {name}\n"
    assert err in [says.format(rank, pid) for rank, pid in enumerate(pids)]
    assert launcher.returncode == 128 + getattr(signal, name)


def test_user_signals_are_passed_on_and_the_run_goes_on(tmp_path):
    with counting(tmp_path) as (launcher, _):
        for name in ("SIGUSR1", "SIGUSR2", "SIGUSR1"):
            launcher.send_signal(getattr(signal, name))
            wait_for_lines(launcher, name)
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGTERM)
        out, err = launcher.communicate(timeout=30)
    assert sorted(out.splitlines()) == lines("SIGTERM")
    assert (launcher.returncode, re.sub(WAITING, "", err)) == (0, "")


def test_user_signals_do_not_reach_children(tmp_path):
    text = """
        import subprocess
        signal.signal(signal.SIGUSR1, lambda *_: print("asked"))
        child = subprocess.Popen(["sleep", "60"])
        open(sys.argv[1], "w").write(f"{child.pid}\\n")
        child.wait()
    """
    with start_launcher("-n", 1, write_script(tmp_path, text), tmp_path / "pid-0") as launcher:
        (child,) = wait_for_pids(tmp_path, 1)
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.stdout.readline() == "asked\n"
        time.sleep(0.3)
        assert is_running(child)


def test_a_second_ctrl_c_kills(tmp_path):
    with counting(tmp_path, stays_s=60) as (launcher, pids):
        launcher.send_signal(signal.SIGINT)
        wait_until(lambda: launcher.stdout.readline() == "[0] SIGINT\n", "the first")
        begun = time.monotonic()
        launcher.send_signal(signal.SIGINT)
        _, err = launcher.communicate(timeout=30)
    assert within(time.monotonic() - begun, 10)
    says = "txcore: after SIGINT from outside rank {} (pid {}) was killed by SIGKILL"
    assert err.splitlines()[-1] in [says.format(rank, pid) for rank, pid in enumerate(pids)]
    assert launcher.returncode == 137
    assert not any(map(is_running, pids))


def test_the_end_of_the_grace_kills(tmp_path):
    with counting(tmp_path, "--grace", 1, stays_s=60) as (launcher, pids):
        begun = time.monotonic()
        launcher.send_signal(signal.SIGTERM)
        out, err = launcher.communicate(timeout=30)
    seconds = time.monotonic() - begun
    assert seconds > 1
    assert within(seconds, 15)
    assert sorted(out.splitlines()) == lines("SIGTERM")
    assert err.endswith("was killed by SIGKILL\n")
    assert (launcher.returncode, any(map(is_running, pids))) == (137, False)


def test_it_says_for_whom_it_waits(tmp_path):
    with counting(tmp_path, stays_s=60) as (launcher, _):
        launcher.send_signal(signal.SIGINT)
        said = launcher.stderr.readline()
        launcher.send_signal(signal.SIGINT)
        _, err = launcher.communicate(timeout=30)
    assert re.fullmatch(r"txcore: waiting [12]\d s for rank 0, 1 to end\n", said)
    assert "waiting" not in err


def test_a_signal_while_a_failure_ends_the_rest_is_forwarded_and_not_the_cause(tmp_path):
    with counting(tmp_path, stays_s=60) as (launcher, pids):
        os.kill(pids[1], signal.SIGKILL)
        assert launcher.stdout.readline() == "[0] SIGTERM\n"
        launcher.send_signal(signal.SIGINT)
        assert launcher.stdout.readline() == "[0] SIGINT\n"
        os.kill(pids[0], signal.SIGKILL)
        _, err = launcher.communicate(timeout=30)
    says = f"txcore: rank 1 (pid {pids[1]}) was killed by SIGKILL\n"
    assert re.sub(WAITING, "", err) == says


def test_under_nohup_a_hangup_ends_nothing(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with counting(tmp_path, stays_s=0) as (launcher, pids):
            launcher.send_signal(signal.SIGHUP)
            time.sleep(1)
            assert launcher.poll() is None
            assert all(map(is_running, pids))
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_end(pids)


TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


def test_ctrl_c_in_a_terminal_comes_once(tmp_path):
    text = write_script(tmp_path, COUNTS.format(folder=str(tmp_path), stays_s=1, code=0))
    with subprocess.Popen(
        [sys.executable, "-c", TERMINAL, *command("-n", 2, text)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as terminal:
        try:
            wait_for_pids(tmp_path, 2)
            terminal.stdin.write(b"\x03")
            terminal.stdin.flush()
            shown = terminal.stdout.read()
            assert terminal.wait(30) == 0
        finally:
            terminal.kill()  # and with it its terminal, whose end hangs up the launcher
    shown = re.sub(WAITING, "", shown.decode().replace("^C", ""))
    assert sorted(shown.splitlines()) == lines("SIGINT")
