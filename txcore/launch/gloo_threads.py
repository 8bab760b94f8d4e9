"""Keep gloo's threads from slowing steps down when several processes share CPU cores."""

import functools
import os
import pathlib
import platform

# The numbers of the system calls that wait for events on sockets.
_EPOLL = {"x86_64": (232, 281), "aarch64": (22,)}
_TASKS = pathlib.Path("/proc/self/task")


@functools.cache
def yield_to_compute() -> tuple[int, ...]:
    """Let gloo's threads run only on cores that are otherwise idle; takes effect once a process.

    When a process reaches a collective late, its peer's data has already arrived. Its gloo thread
    is woken again and again until the collective is posted, and takes up to half a core from the
    step that every process waits for (two processes on two cores: 76 ms a step instead of 36). In
    the idle scheduling class the threads still run at once when the step waits for them.

    Returns:
      The ids of the threads; empty outside Linux, or if the system does not show them.
    """
    calls = _EPOLL.get(platform.machine(), ())
    if not calls or not hasattr(os, "SCHED_IDLE"):
        return ()
    try:
        name = (_TASKS / str(os.getpid()) / "comm").read_text()
        return tuple(tid for tid in map(int, os.listdir(_TASKS)) if _lower_thread(tid, name, calls))
    except OSError:
        return ()


def _lower_thread(tid: int, name: str, calls: tuple[int, ...]) -> bool:
    """Lower one thread's priority if it waits on sockets and is unnamed (gRPC names its own)."""
    try:
        waits_in = (_TASKS / str(tid) / "syscall").read_text().split()[0]
        if (_TASKS / str(tid) / "comm").read_text() != name or waits_in not in map(str, calls):
            return False
        os.sched_setscheduler(tid, os.SCHED_IDLE, os.sched_param(0))
    except (OSError, IndexError):  # it has ended, or may not be read
        return False
    return True
