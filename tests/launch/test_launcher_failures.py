"""`txcore launch`: the first failure ends the rest, is the one that is shown, and none is left."""

import errno
import os
import re
import signal
import sys
import time

import pytest
from launched_cases import (
    is_running,
    launch,
    start_launcher,
    wait_for_end,
    wait_for_pids,
    wait_until,
    write_script,
)
from machine import within

from txcore.launch.launcher import hosts, supervise

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tested on Linux")

# Each writes its pid, and then does what its rank is told.
RANKS = """
    import subprocess
    rank = os.environ["JAX_PROCESS_ID"]

    def tell(pid, name="pid"):
        open(os.path.join({folder!r}, f"{{name}}-{{rank}}"), "w").write(f"{{pid}}\\n")

    def wait_for(*names):
        paths = [os.path.join({folder!r}, name) for name in names]
        while not all(os.path.exists(path) and os.path.getsize(path) for path in paths):
            time.sleep(0.01)

    def abort():
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.abort()

    tell(os.getpid())
"""


@pytest.fixture
def ranks(tmp_path):
    """Write a script in which each rank does its own."""

    def write(*bodies):
        text = RANKS.format(folder=str(tmp_path))
        for rank, body in enumerate(bodies):
            text += f"\n    if rank == '{rank}':\n"
            text += "".join(f"        {line}\n" for line in body.splitlines())
        return write_script(tmp_path, text)

    return write


def last_line(text):
    return text.splitlines()[-1]


def reported(done):
    """Return the last line of stderr, which names the rank that failed, with P for the pid."""
    return re.sub(r"\(pid \d+\)", "(pid P)", last_line(done.stderr))


SLEEPS = "time.sleep(60)"


def test_the_exit_code_is_kept_and_the_others_end(tmp_path, ranks):
    begun = time.monotonic()
    done = launch("-n", 3, ranks(SLEEPS, "wait_for('pid-0', 'pid-2'); sys.exit(42)", SLEEPS))
    assert within(time.monotonic() - begun, 20)
    pids = wait_for_pids(tmp_path, 3)
    assert done.returncode == 42
    assert done.stderr == f"txcore: rank 1 (pid {pids[1]}) ended with exit code 42\n"
    assert not any(map(is_running, pids))


def test_nothing_is_said_where_all_is_well():
    done = launch("-n", 2, "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ranks_may_end_at_different_times(ranks):
    done = launch("-n", 2, ranks("pass", "time.sleep(1); print('late')"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1] late\n", "")


def test_a_killed_rank_is_named_with_its_signal(tmp_path, ranks):
    with start_launcher("-n", 3, ranks(SLEEPS, SLEEPS, SLEEPS)) as launcher:
        pids = wait_for_pids(tmp_path, 3)
        os.kill(pids[2], signal.SIGKILL)
        _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert err == f"txcore: rank 2 (pid {pids[2]}) was killed by SIGKILL\n"
    assert not any(map(is_running, pids))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGSEGV"])
def test_other_signals_from_elsewhere(tmp_path, ranks, name):
    with start_launcher("-n", 2, ranks(SLEEPS, SLEEPS)) as launcher:
        pids = wait_for_pids(tmp_path, 2)
        os.kill(pids[1], getattr(signal, name))
        _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + getattr(signal, name)
    assert last_line(err) == f"txcore: rank 1 (pid {pids[1]}) was killed by {name}"


def test_a_real_time_signal_has_a_number(ranks):
    done = launch("-n", 1, ranks("os.kill(os.getpid(), 40)"))
    assert reported(done) == "txcore: rank 0 (pid P) was killed by signal 40"
    assert done.returncode == 168


SERVES = """
import socket
with socket.socket(socket.AF_UNIX) as server:
    server.bind(os.path.join(os.path.dirname(__file__), "socket"))
    server.listen()
    peers = [server.accept() for _ in range(2)]
    tell(os.getpid(), "all")
    time.sleep(60)
"""
NOTICES = """
import socket
with socket.socket(socket.AF_UNIX) as peer:
    while peer.connect_ex(os.path.join(os.path.dirname(__file__), "socket")):
        time.sleep(0.01)
    peer.recv(1)
    os._exit(1)
"""


@pytest.mark.parametrize("time", range(5))
def test_who_only_notices_the_loss_of_another_is_not_the_first(tmp_path, ranks, time):
    with start_launcher("-n", 3, ranks(NOTICES, SERVES, NOTICES)) as launcher:
        wait_until((tmp_path / "all-1").exists, "connections")
        pid = wait_for_pids(tmp_path, 3)[1]
        os.kill(pid, signal.SIGKILL)
        _, err = launcher.communicate(timeout=30)
    assert err == f"txcore: rank 1 (pid {pid}) was killed by SIGKILL\n"
    assert launcher.returncode == 137


@pytest.mark.parametrize(
    "later, first", [("kill -KILL $$", 1), ("kill -ABRT $$", 0), ("exit 3", 0)]
)
def test_of_those_that_end_at_once_the_one_that_was_killed_counts(monkeypatch, later, first):
    monkeypatch.setattr(supervise, "_SETTLE_S", 1.5)
    tasks = [
        hosts.Task(0, ["sh", "-c", "exit 1"]),
        hosts.Task(1, ["sh", "-c", f"sleep 0.3; {later}"]),
    ]
    assert supervise.launch_ranks(tasks).rank == first


IGNORES = "signal.signal(signal.SIGTERM, signal.SIG_IGN); tell(os.getpid(), 'ignores')\n"


def obeys(code):
    """Return what ends with a code when SIGTERM comes."""
    handler = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))"
    return f"{handler}; tell(os.getpid(), 'obeys'); {SLEEPS}"


@pytest.mark.parametrize(
    "lost, says, code",
    [
        ("sys.exit(75)", "ended with exit code 75", 75),
        ("abort()", "was killed by SIGABRT", 134),
        ("sys.exit(134)", "ended with exit code 134", 134),
    ],
)
def test_who_has_lost_a_peer_gives_way_to_who_fails_by_itself(ranks, lost, says, code):
    first = f"wait_for('ignores-1', 'ignores-2'); {lost}"
    fails = f"{IGNORES}time.sleep(1); sys.exit(3)"
    done = launch("-n", 3, ranks(first, fails, IGNORES + "time.sleep(0.5); sys.exit(75)"))
    assert (reported(done), done.returncode) == ("txcore: rank 1 (pid P) ended with exit code 3", 3)
    begun = time.monotonic()
    done = launch("-n", 3, ranks(SLEEPS, lost, SLEEPS))
    assert (reported(done), done.returncode) == (f"txcore: rank 1 (pid P) {says}", code)
    assert time.monotonic() - begun > (5 if code == 75 else 0)  # the watch's, to end the others


def test_of_those_that_fail_by_themselves_the_first_counts(ranks):
    done = launch("-n", 2, ranks(obeys(3), "wait_for('obeys-0'); sys.exit(4)"))
    assert (reported(done), done.returncode) == ("txcore: rank 1 (pid P) ended with exit code 4", 4)


def test_who_ends_by_our_signal_gives_way_to_who_has_lost_a_peer(ranks):
    done = launch("-n", 3, ranks(SLEEPS, obeys(143), "wait_for('obeys-1'); sys.exit(134)"))
    assert reported(done) == "txcore: rank 2 (pid P) ended with exit code 134"
    assert done.returncode == 134


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(tmp_path, ranks):
    fails = "wait_for('ignores-0'); sys.exit(5)"
    begun = time.monotonic()
    done = launch("-n", 2, "--grace", 3, ranks(IGNORES + SLEEPS, fails))
    seconds = time.monotonic() - begun
    assert seconds > 3
    assert within(seconds, 20)
    assert re.sub(r"\d+", "N", done.stderr).splitlines() == [
        "txcore: waiting N s for rank N to end",
        "txcore: rank N (pid N) ended with exit code N",
    ]
    assert done.returncode == 5
    assert not any(map(is_running, wait_for_pids(tmp_path, 2)))


def test_no_grace(ranks):
    begun = time.monotonic()
    fails = "wait_for('ignores-0'); sys.exit(5)"
    done = launch("-n", 2, "--grace", 0, ranks(IGNORES + SLEEPS, fails))
    assert within(time.monotonic() - begun, 15)
    assert done.returncode == 5


def test_a_stopped_rank_can_end_by_itself(tmp_path, ranks):
    with start_launcher("-n", 2, ranks(obeys("print('saved')"), SLEEPS)) as launcher:
        pids = wait_for_pids(tmp_path, 2)
        wait_until((tmp_path / "obeys-0").exists, "its handler")
        os.kill(pids[0], signal.SIGSTOP)
        os.kill(pids[1], signal.SIGKILL)
        out, _ = launcher.communicate(timeout=20)
    assert (out, launcher.returncode) == ("[0] saved\n", 137)


CHILD = "tell(subprocess.Popen(['sleep', '60']).pid, 'child')\n"


def children(folder, count):
    paths = [folder / f"child-{rank}" for rank in range(count)]
    wait_until(lambda: all(p.exists() and p.read_text().endswith("\n") for p in paths), "children")
    return [int(path.read_text()) for path in paths]


@pytest.mark.parametrize("ending", ["sys.exit(0)", "sys.exit(1)", "os.kill(os.getpid(), 9)"])
def test_what_a_rank_has_started_ends_with_it(tmp_path, ranks, ending):
    launch("-n", 1, ranks(CHILD + ending))
    wait_for_end(children(tmp_path, 1))


def test_what_the_others_have_started_ends_too(tmp_path, ranks):
    ignores = CHILD.replace("sleep', '60'", "sh', '-c', 'trap \"\" TERM; sleep 60; sleep 60'")
    done = launch("-n", 2, ranks(ignores + SLEEPS, "wait_for('child-0'); sys.exit(1)"))
    assert done.returncode == 1
    wait_for_end(children(tmp_path, 1))


def test_a_killed_launcher_leaves_nothing(tmp_path, ranks):
    body = IGNORES + CHILD + SLEEPS
    with start_launcher("-n", 2, ranks(body, body)) as launcher:
        pids = wait_for_pids(tmp_path, 2) + children(tmp_path, 2)
        assert all(map(is_running, pids))
        launcher.kill()
        wait_for_end(pids)


def test_a_launcher_killed_with_its_group_leaves_nothing(tmp_path, ranks):
    body = IGNORES + SLEEPS
    with start_launcher("-n", 2, ranks(body, body), start_new_session=True) as launcher:
        pids = wait_for_pids(tmp_path, 2)
        os.killpg(launcher.pid, signal.SIGKILL)
        wait_for_end(pids)


def test_the_end_of_the_file_of_the_rank_that_failed_is_shown(tmp_path):
    fails = write_script(
        tmp_path,
        """
        if os.environ["JAX_PROCESS_ID"] == "0":
            time.sleep(60)
        for i in range(int(sys.argv[1])):
            print("line", i, file=sys.stderr)
        sys.exit(7)
        """,
    )
    for lines, shown in ((100, range(80, 100)), (2, range(2))):  # not those of the run before
        done = launch("-n", 2, "--output-dir", tmp_path, fails, lines)
        *tail, report = done.stderr.splitlines()
        assert tail == [f"[1] line {i}" for i in shown]
        assert re.fullmatch(r"txcore: rank 1 \(pid \d+\) ended with exit code 7", report)
        assert done.returncode == 7


def test_nothing_is_left_where_a_later_rank_cannot_start(tmp_path, monkeypatch, ranks):
    def open_rank(task, *args, **options):
        if task.rank == 1:
            wait_for_pids(tmp_path, 1)
            raise OSError(errno.EAGAIN, "no more processes")
        return opened(task, *args, **options)

    opened = hosts.open_rank
    monkeypatch.setattr(hosts, "open_rank", open_rank)
    argv = [sys.executable, str(ranks(SLEEPS, SLEEPS))]
    environment = {"JAX_PROCESS_ID": "0"}
    before = {n: signal.getsignal(n) for n in (*hosts.STOPS, *hosts.PASSED, signal.SIGCHLD)}
    with pytest.raises(OSError, match="no more processes"):
        supervise.launch_ranks([hosts.Task(rank, argv, environment) for rank in range(2)])
    assert not is_running(wait_for_pids(tmp_path, 1)[0])
    assert {n: signal.getsignal(n) for n in before} == before


def test_it_sleeps_while_it_waits_though_another_rank_fails_meanwhile(monkeypatch):
    waits, read = [], hosts.read_signals

    def counted(arrived, until):
        waits.append(until)
        return read(arrived, until)

    monkeypatch.setattr(hosts, "read_signals", counted)
    stays = "trap : TERM; sleep 1 & wait; sleep 1"
    commands = ["sleep 0.5; exit 3", "trap 'exit 5' TERM; sleep 30 & wait", stays]
    tasks = [hosts.Task(rank, ["sh", "-c", text]) for rank, text in enumerate(commands)]
    assert supervise.launch_ranks(tasks).exit_code == 3
    assert len(waits) < 30
