"""`txcore launch`: whose line is whose, and that none is lost, whatever the ranks write."""

import os
import random
import re
import select
import signal
import subprocess
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

from txcore.launch.launcher import output

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tested on Linux")

MEBI = 2**20
# For scripts, indented as they are.
WAIT = """
        def wait_for(name):
            signal.alarm(60)  # for a test that reads in vain
            while not os.path.exists(name):
                time.sleep(0.01)
"""


def by_rank(text):
    """Return each rank's lines; fail for a line without its rank."""
    found = {}
    for line in text.splitlines(keepends=True):
        match = re.fullmatch(rb"\[(\d+)\] (.*)", line, re.DOTALL)
        assert match, line[:200]
        found.setdefault(int(match[1]), []).append(match[2])
    return found


def test_lines_bear_the_rank_and_stdout_and_stderr_stay_apart(tmp_path):
    both = write_script(
        tmp_path,
        """
        for i in range(3):
            print("out", os.environ["JAX_PROCESS_ID"], i)
            print("err", os.environ["JAX_PROCESS_ID"], i, file=sys.stderr)
        """,
    )
    done = launch("-n", 2, both, text=False)
    for text, name in ((done.stdout, "out"), (done.stderr, "err")):
        expected = {r: [f"{name} {r} {i}\n".encode() for i in range(3)] for r in range(2)}
        assert by_rank(text) == expected


def test_long_lines_of_all_stay_whole_on_one_pipe(tmp_path):
    long = write_script(
        tmp_path,
        f"""
        letter = "abc"[int(os.environ["JAX_PROCESS_ID"])]
        for i in range(4):
            print(letter * {MEBI})
            print(letter.upper() * {MEBI}, file=sys.stderr)
        """,
    )
    done = launch("-n", 3, long, text=False, capture_output=False, **ONE_PIPE)
    lines = by_rank(done.stdout)
    for rank, letter in enumerate((b"a", b"b", b"c")):
        both = [letter * MEBI + b"\n", letter.upper() * MEBI + b"\n"]
        assert sorted(lines[rank]) == sorted(both * 4)


ONE_PIPE = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}


def test_many_lines_come_all_and_in_order():
    count = 200_000
    done = launch("-n", 2, "seq", count, text=False)
    expected = [b"%d\n" % i for i in range(1, count + 1)]
    assert by_rank(done.stdout) == {0: expected, 1: expected}


def test_a_line_in_pieces_is_one_line(tmp_path):
    pieces = write_script(
        tmp_path,
        """
        for piece in ("one ", "two ", "three\\n", "the rest"):
            sys.stdout.write(piece)
            sys.stdout.flush()
            time.sleep(0.05)
        """,
    )
    done = launch("-n", 2, pieces, text=False)
    assert by_rank(done.stdout) == {r: [b"one two three\n", b"the rest\n"] for r in range(2)}


def test_progress_comes_while_it_is_made(tmp_path):
    progress = write_script(
        tmp_path,
        """
        if os.environ["JAX_PROCESS_ID"] == "0":
            for percent in (10, 20):
                sys.stdout.write(f"\\r{percent}%")
                time.sleep(0.1)
            time.sleep(60)
        """,
    )
    with start_launcher("-n", 2, progress, text=False) as launcher:
        assert select.select([launcher.stdout], [], [], 30)[0]
        assert os.read(launcher.stdout.fileno(), 100) == b"[0] 10%\r"


def test_another_rank_leaves_the_progress_of_one_to_be_seen(tmp_path):
    progress = write_script(
        tmp_path,
        WAIT
        + """
        if os.environ["JAX_PROCESS_ID"] == "0":
            sys.stdout.write("10%\\r20%\\r\\r")
            wait_for("second")
            sys.stdout.write("done\\r\\n")
        else:
            wait_for("first")
            print("line")
        """,
    )
    with start_launcher("-n", 2, progress, text=False, cwd=tmp_path) as launcher:
        for shown, then in ((b"[0] 10%\r[0] 20%\r", "first"), (b"\n[1] line\n", "second")):
            assert launcher.stdout.read(len(shown)) == shown
            (tmp_path / then).touch()
        assert launcher.stdout.read() == b"[0] done\r\n"


def test_what_the_launcher_says_begins_on_a_line_of_its_own(tmp_path):
    fails = write_script(
        tmp_path,
        WAIT
        + """
        if os.environ["JAX_PROCESS_ID"] == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            sys.stderr.write("10%\\r20%")
            wait_for("waited")
            sys.stderr.write("\\r30%\\r")
        else:
            wait_for("shown")
            sys.exit(3)
        """,
    )
    with start_launcher("-n", 2, fails, text=False, cwd=tmp_path) as launcher:
        err = launcher.stderr.read(len(b"[0] 10%\r"))
        (tmp_path / "shown").touch()
        err += launcher.stderr.readline() + launcher.stderr.readline()
        (tmp_path / "waited").touch()
        err += launcher.stderr.read()
    err = re.sub(rb"pid \d+", b"pid P", re.sub(rb"waiting [12]\d s", b"waiting N s", err))
    assert err.splitlines(keepends=True) == [
        b"[0] 10%\r\n",
        b"txcore: waiting N s for rank 0 to end\n",
        b"[0] 20%\r",
        b"[0] 30%\r\n",
        b"txcore: rank 1 (pid P) ended with exit code 3\n",
    ]


def test_a_stuck_reader_of_stderr_does_not_keep_a_rank_alive(tmp_path):
    fills = write_script(
        tmp_path,
        f"""
        if os.environ["JAX_PROCESS_ID"] == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            open(sys.argv[1], "w").write(f"{{os.getpid()}}\\n")
            while True:
                print("x" * {MEBI}, file=sys.stderr)
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.01)
        sys.exit(3)
        """,
    )
    with start_launcher("-n", 2, "--grace", 2.5, fills, tmp_path / "pid-0", text=False) as launcher:
        wait_for_end(wait_for_pids(tmp_path, 1))
        err = launcher.stderr.read()
        assert launcher.wait(30) == 3
    assert err.splitlines()[-1].startswith(b"txcore: rank 1 (pid ")


def test_bytes_that_are_no_text_come_through(tmp_path):
    raw = write_script(tmp_path, "os.write(1, bytes(set(range(256)) - {10, 13}) + b'\\n')")
    expected = bytes(sorted({*range(256)} - {10, 13})) + b"\n"
    assert by_rank(launch("-n", 2, raw, text=False).stdout) == {0: [expected], 1: [expected]}


def test_lines_do_not_depend_on_how_they_arrive():
    source = random.Random(0)
    text = b"".join(source.choice([b"a", b"bc", b"\n", b"\r", b"\r\n"]) for _ in range(3000))
    whole = bytearray()
    expected = [*output.lines(whole, text), *output.lines(whole, b"")]
    assert b"".join(expected).replace(b"\r", b"") == text.replace(b"\r", b"") + (
        b"" if text.endswith((b"\n", b"\r")) else b"\n"
    )
    for _ in range(50):
        rest, found, at = bytearray(), [], 0
        while at < len(text):
            size = source.choice([1, 2, 3, 50])
            found += output.lines(rest, text[at : at + size])
            at += size
        assert [*found, *output.lines(rest, b"")] == expected


def test_the_beginning_of_a_long_line_takes_no_time():
    rest, begun = bytearray(), time.process_time()
    assert output.lines(rest, b"\n" + b"x" * MEBI) == [b"\n"]
    assert time.process_time() - begun < 1


def test_a_line_without_end_is_broken(monkeypatch):
    monkeypatch.setattr(output, "_LINE_BYTES", 100)
    rest, found = bytearray(), []
    for _ in range(5):
        found += output.lines(rest, b"x" * 60)
    assert found == [b"x" * 120 + b"\n"] * 2
    assert rest == b"x" * 60


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)"])
def test_the_last_lines_of_a_killed_rank(tmp_path, ending):
    dies = write_script(
        tmp_path,
        f"""
        if os.environ["JAX_PROCESS_ID"] == "1":
            for i in range(1000):
                print("out", i)
                print("err", i, file=sys.stderr)
            sys.stdout.write("last")
            {ending}
        time.sleep(60)
        """,
    )
    done = launch("-n", 2, dies, text=False)
    assert by_rank(done.stdout)[1] == [b"out %d\n" % i for i in range(1000)] + [b"last\n"]
    *lines, report = done.stderr.splitlines(keepends=True)
    assert by_rank(b"".join(lines)) == {1: [b"err %d\n" % i for i in range(1000)]}
    assert report.startswith(b"txcore: rank 1 (pid ")


def test_one_full_pipe_does_not_hold_up_the_other(tmp_path):
    fills = write_script(
        tmp_path,
        f"""
        stream = (sys.stdout, sys.stderr)[int(os.environ["JAX_PROCESS_ID"])]
        for i in range(8):
            print("x" * {MEBI}, file=stream)
        """,
    )
    with start_launcher("-n", 2, fills, text=False) as launcher:
        err = launcher.stderr.read(8 * (MEBI + len("[1] \n")))  # while nobody reads stdout
        out = launcher.stdout.read()
        assert launcher.wait(30) == 0
    line = b"x" * MEBI + b"\n"
    assert (by_rank(out), by_rank(err)) == ({0: [line] * 8}, {1: [line] * 8})


def test_a_slow_reader_gets_everything(tmp_path):
    fills = write_script(tmp_path, f"print('x' * {MEBI})")
    with start_launcher("-n", 2, fills, text=False) as launcher:
        time.sleep(1)  # the ranks would have ended by now
        assert launcher.poll() is None
        line = b"x" * MEBI + b"\n"
        assert by_rank(launcher.stdout.read()) == {0: [line], 1: [line]}
        assert launcher.wait(30) == 0


def test_ctrl_c_does_not_wait_for_a_reader_that_has_stopped(tmp_path):
    fills = write_script(tmp_path, f"print('x' * {MEBI})")
    with start_launcher("-n", 2, fills, text=False) as launcher:
        assert select.select([launcher.stdout], [], [], 30)[0]
        time.sleep(0.5)

        def ends():
            launcher.send_signal(signal.SIGINT)
            time.sleep(0.3)  # two at once are one
            return launcher.poll() is not None

        wait_until(ends, "the end")


def test_nobody_reads(tmp_path):
    endless = write_script(
        tmp_path,
        f"""
        rank = os.environ["JAX_PROCESS_ID"]
        open({str(tmp_path)!r} + f"/pid-{{rank}}", "w").write(f"{{os.getpid()}}\\n")
        while True:
            print("line")
            time.sleep(0.01)
        """,
    )
    with start_launcher("-n", 2, endless, text=False) as launcher:
        pids = wait_for_pids(tmp_path, 2)
        launcher.stdout.close()
        assert launcher.wait(30) == 1
        wait_for_end(pids)
        assert b"BrokenPipeError" in launcher.stderr.read()


def test_one_that_left_its_group_and_holds_the_pipes_holds_up_nobody(tmp_path):
    leaves = write_script(
        tmp_path,
        f"""
        import subprocess
        rank = os.environ["JAX_PROCESS_ID"]
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
        open({str(tmp_path)!r} + f"/pid-{{rank}}", "w").write(f"{{child.pid}}\\n")
        print("the last line")
        """,
    )
    begun = time.monotonic()
    try:
        done = launch("-n", 2, leaves, text=False, timeout=30)
        assert by_rank(done.stdout) == {0: [b"the last line\n"], 1: [b"the last line\n"]}
        assert within(time.monotonic() - begun, 30)
    finally:
        for pid in wait_for_pids(tmp_path, 2):
            assert is_running(pid)
            os.kill(pid, signal.SIGKILL)


def test_a_single_rank_writes_by_itself(tmp_path):
    single = write_script(tmp_path, "print(os.readlink('/proc/self/fd/1'), end='')")
    with (tmp_path / "out").open("w") as out:
        launch("-n", 1, single, capture_output=False, stdout=out)
    assert (tmp_path / "out").read_text() == str(tmp_path / "out")


def test_a_file_for_each_rank_and_stream(tmp_path):
    both = write_script(
        tmp_path,
        "print('out', os.environ['JAX_PROCESS_ID']); print('err', file=sys.stderr)",
    )
    folder = tmp_path / "new" / "logs"
    for _ in range(2):  # the second adds to the first
        done = launch("-n", 2, "--output-dir", folder, both)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert found == {
        "rank-0.out": "out 0\n" * 2,
        "rank-1.out": "out 1\n" * 2,
        "rank-0.err": "err\n" * 2,
        "rank-1.err": "err\n" * 2,
    }
