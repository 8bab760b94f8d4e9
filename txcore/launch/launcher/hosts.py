"""A rank of `txcore launch` on its host: its environment, cores and GPUs, start and signals.

Run as a script, this file is the far end of a remote shell: it starts one rank there. It imports
nothing but Python's own library.
"""

import contextlib
import ctypes
import dataclasses
import glob
import json
import math
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # end a run
PASSED = (signal.SIGUSR1, signal.SIGUSR2)  # passed on to the ranks
# Kills the process groups of the last line that it has read, once the other end is gone.
_WATCHMAN = 'while read -r line; do last=$line; done; [ -z "$last" ] || kill -s KILL -- $last'
_TAIL_LINES, _TAIL_BYTES = 20, 2**16
OWN_WORDS, _KEPT_WORDS = b"txcore: ", 20  # begins txcore's own lines; how many of them are kept
_CPU = pathlib.Path("/sys/devices/system/cpu")
_PR_SET_PDEATHSIG = 1  # Linux's include/uapi/linux/prctl.h


@dataclasses.dataclass(frozen=True)
class Task:
    """Describe one rank's command, host and share of its host.

    Attributes:
      rank: from 0.
      argv: the command.
      environment: variables besides those of its host.
      cwd: its working folder.
      host: its host's name for the remote shell; "" for this host.
      local_rank: its number among its host's ranks, from 0.
      local_size: the number of ranks on its host.
      devices: the number of its GPUs; None for an equal share of its host's.
      pin: whether it gets cores of its own.
    """

    rank: int
    argv: list[str]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    cwd: str = "."
    host: str = ""
    local_rank: int = 0
    local_size: int = 1
    devices: int | None = None
    pin: bool = True


@dataclasses.dataclass
class Rank:
    """Hold a started rank.

    Attributes:
      task: its task.
      process: the rank, or the remote shell that runs it.
      stderr: the file of its stderr, which may have had content before.
      stderr_start: the length of that content in bytes.
      sent: the signals sent to end it.
      code: as Popen.returncode; None while it runs.
      ended: when its end was seen, by a steady clock.
      words: the last lines of txcore's own that it has written.
    """

    task: Task
    process: subprocess.Popen[bytes]
    stderr: pathlib.Path | None
    stderr_start: int
    sent: set[int] = dataclasses.field(default_factory=set)
    code: int | None = None
    ended: float = math.inf
    words: list[str] = dataclasses.field(default_factory=list)

    def ended_by_us(self) -> bool:
        """Tell whether it ended by a signal that was sent to end it."""
        return self.code in {code for number in self.sent for code in (-number, 128 + number)}

    def last_lines(self) -> list[str]:
        """Return the last lines of its stderr's file."""
        return [line.decode(errors="replace") for line in self._read_stderr_end()[-_TAIL_LINES:]]

    def _read_stderr_end(self) -> list[bytes]:
        """Return the end of its stderr's file, by lines."""
        if self.stderr is None:
            return []
        try:
            with self.stderr.open("rb") as file:
                file.seek(max(self.stderr_start, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                return file.read().splitlines()
        except OSError:  # deleted meanwhile
            return []

    def own_words(self) -> list[str]:
        """Return the last lines of txcore's own that it has written, without line ends."""
        if self.stderr is not None:
            self.keep_words(self._read_stderr_end())
        return self.words

    def keep_words(self, lines: Sequence[bytes]) -> None:
        """Keep the lines that txcore itself has written."""
        for line in lines:
            if line.startswith(OWN_WORDS):
                self.words = [*self.words[1 - _KEPT_WORDS :], line.decode(errors="replace").strip()]

    def __str__(self) -> str:
        where = f"on {self.task.host}" if self.task.host else f"pid {self.process.pid}"
        return f"rank {self.task.rank} ({where})"


def cores_of(local_rank: int, local_size: int) -> set[int]:
    """Return one rank's equal share of the cores that this process may use.

    Cores that share a socket or a physical core go to the same rank. With fewer cores than ranks,
    every rank gets all of them.

    Args:
      local_rank: its number among the host's ranks, from 0.
      local_size: the number of ranks on the host.

    Example:
      >>> import os
      >>> from txcore.launch.launcher import hosts
      >>> hosts.cores_of(0, 1) == os.sched_getaffinity(0)
      True
    """
    cores = sorted(os.sched_getaffinity(0), key=_core_topology)
    each = len(cores) // local_size
    return set(cores[local_rank * each : (local_rank + 1) * each]) or set(cores)


def _core_topology(core: int) -> tuple[int, int, int]:
    """Return a core's (socket, physical core, number)."""
    try:
        names = ("physical_package_id", "core_id")
        texts = [(_CPU / f"cpu{core}" / "topology" / name).read_text() for name in names]
        return int(texts[0]), int(texts[1]), core
    except (OSError, ValueError):
        return 0, core, core


def gpus_of(task: Task, environment: Mapping[str, str]) -> list[str]:
    """Return the consecutive GPUs of a rank; none if it does not run on GPUs.

    Args:
      task: the rank; without `devices` it gets an equal share of its host's.
      environment: its host's; CUDA_VISIBLE_DEVICES lists the GPUs to share.

    Raises:
      ValueError: the host has fewer GPUs than its ranks need.

    Example:
      >>> from txcore.launch.launcher import hosts
      >>> second = hosts.Task(1, ["true"], local_rank=1, local_size=2)
      >>> hosts.gpus_of(second, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"})
      ['6', '7']
    """
    platforms = environment.get("JAX_PLATFORMS", "").lower()
    if platforms and not {"cuda", "gpu"} & {*platforms.split(",")}:
        return []
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        found = [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    else:
        found = [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    each = task.devices or len(found) // task.local_size
    if found and each * task.local_size > len(found):
        raise ValueError(
            f"--devices-per-process {each} for {task.local_size} ranks on a host needs "
            f"{each * task.local_size} GPUs, but there are {len(found)}: lower it, or set "
            "JAX_PLATFORMS=cpu to simulate devices on the CPU"
        )
    return found[task.local_rank * each : (task.local_rank + 1) * each]


def start_task(task: Task, **options: Any) -> subprocess.Popen[bytes]:
    """Start a rank on this host, in a session of its own, on its cores and GPUs.

    Args:
      task: the rank.
      **options: of subprocess.Popen.

    Raises:
      OSError: it cannot be started.
      ValueError: there are too few GPUs.

    Example:
      >>> from txcore.launch.launcher import hosts
      >>> hosts.start_task(hosts.Task(0, ["true"])).wait()
      0
    """
    environment = os.environ | task.environment
    if gpus := gpus_of(task, environment):
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    with _pin_thread(task):
        return subprocess.Popen(
            task.argv, cwd=task.cwd, env=environment, start_new_session=True, **options
        )


@contextlib.contextmanager
def _pin_thread(task: Task) -> Any:
    """Pin this thread to a rank's cores, which a child process inherits."""
    if not task.pin or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores_of(task.local_rank, task.local_size))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def deliver_signal(pid: int, number: int) -> None:
    """Send a signal to a rank and to the processes that it has started.

    SIGUSR1 and SIGUSR2 go to the rank alone: they end a process that does not expect them.

    Args:
      pid: the rank's process, which leads its group.
      number: the signal.

    Example:
      >>> import signal
      >>> from txcore.launch.launcher import hosts
      >>> rank = hosts.start_task(hosts.Task(0, ["sleep", "60"]))
      >>> hosts.deliver_signal(rank.pid, signal.SIGTERM)
      >>> rank.wait()
      -15
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if number in PASSED:
            os.kill(pid, number)
        else:
            os.killpg(pid, number)


def busy_s(pid: int) -> float:
    """Return the CPU seconds of a rank and of the processes in its session.

    Args:
      pid: the rank's process, which leads its session.
    """
    ticks = 0
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            fields = pathlib.Path(path).read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if fields[3] == str(pid):  # session; then utime, stime and those of its ended children
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def open_rank(
    task: Task, remote_shell: Sequence[str], output_dir: pathlib.Path | None, *, alone: bool
) -> Rank:
    """Start a rank; it gets our own streams if it is `alone`, else rank 0 gets our stdin."""
    stdin = None if task.rank == 0 else subprocess.DEVNULL
    path, at = None, 0
    with contextlib.ExitStack() as files:
        out: int | IO[bytes] | None = None if alone else subprocess.PIPE
        err = out
        if output_dir is not None:
            path = output_dir / f"rank-{task.rank}.err"
            out = files.enter_context(path.with_suffix(".out").open("ab"))
            err = files.enter_context(path.open("ab"))
            at = err.tell()
        if not task.host:
            process = start_task(task, stdin=stdin, stdout=out, stderr=err, bufsize=0)
            return Rank(task, process, path, at)
        process = subprocess.Popen(
            [*remote_shell, task.host, sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            bufsize=0,
            start_new_session=True,
        )
    write_line(process, json.dumps(dataclasses.asdict(task)))
    return Rank(task, process, path, at)


def send_signal(rank: Rank, number: int) -> None:
    """Send a signal to a rank, wherever it is."""
    if rank.task.host:
        write_line(rank.process, signal.Signals(number).name)
    else:
        deliver_signal(rank.process.pid, number)


def write_line(process: subprocess.Popen[bytes], line: str) -> None:
    """Write a line to a process's unbuffered stdin; ignore a process that has ended."""
    text = line.encode() + b"\n"
    with contextlib.suppress(BrokenPipeError):
        while text and process.stdin is not None:
            text = text[process.stdin.write(text) :]


@contextlib.contextmanager
def collect_signals() -> Iterator[int]:
    """Collect signals instead of obeying them; yield the pipe from which to read their numbers."""
    arrived, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    # Ignored signals stay ignored: under nohup a hangup ends neither us nor the ranks.
    taken = [n for n in (*STOPS, *PASSED) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {n: signal.signal(n, lambda *_: None) for n in (*taken, signal.SIGCHLD)}
    previous = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    try:
        yield arrived
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.close(arrived)
        os.close(wakeup)


def read_signals(arrived: int, until: float) -> bytes:
    """Wait for signals until a monotonic time; return their numbers as they came."""
    timeout = max(0.0, min(until - time.monotonic(), 3600.0))
    return os.read(arrived, 2**16) if select.select([arrived], [], [], timeout)[0] else b""


@contextlib.contextmanager
def start_watchman() -> Iterator[Callable[[Sequence[int]], None]]:
    """Start a process that kills the ranks if we are killed; yield what gets their pids."""
    null = subprocess.DEVNULL
    command = ["/bin/sh", "-c", _WATCHMAN]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=null, stderr=null, bufsize=0, start_new_session=True
    )
    with process:
        try:
            yield lambda pids: write_line(process, " ".join(f"-{pid}" for pid in pids))
        finally:
            write_line(process, "")


def _run_far_end() -> int:
    """Start the rank that stdin's first line describes; send it the signals that later lines name.

    The end of stdin (the launcher or the connection is gone) kills the rank.
    """
    line = sys.stdin.buffer.readline()
    if not line:
        return 1
    task = Task(**json.loads(line))
    try:
        process = start_task(task, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        where = socket.gethostname()
        print(f"txcore: rank {task.rank} cannot start on {where}: {error}", file=sys.stderr)
        return 127
    threading.Thread(target=_obey_signals, args=(process.pid,), daemon=True).start()
    code = process.wait()
    deliver_signal(process.pid, signal.SIGKILL)  # what it has left running
    return code if code >= 0 else 128 - code


def _obey_signals(pid: int) -> None:
    for line in sys.stdin.buffer:
        deliver_signal(pid, signal.Signals[line.decode().strip()])
    deliver_signal(pid, signal.SIGKILL)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    ending = _run_far_end()
    sys.stderr.flush()
    os._exit(ending)  # a thread still waits for stdin
