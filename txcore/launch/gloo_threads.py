"""What several processes on one host's CPU cores do to each other's threads."""

import functools
import os
import pathlib
import platform

# The number of the system calls that wait for events on sockets.
_EPOLL = {"x86_64": (232, 281), "aarch64": (22,)}
_TASKS = pathlib.Path("/proc/self/task")


@functools.cache
def yield_to_compute() -> tuple[int, ...]:
    """Let gloo's threads run only where nothing else wants the core; do it once a process.

    A process that comes late to a collective finds its peer's data there already. Its gloo thread
    is told so again and again until the collective is posted, and takes up to half of a core from
    the step that all are waiting for (two processes on two cores: 76 ms a step instead of 36). As
    threads of the idle class they still run at once when the step waits for them.

    Returns:
      The ids of the threads; none where the system is no Linux or does not tell.
    """
    calls = _EPOLL.get(platform.machine(), ())
    if not calls or not hasattr(os, "SCHED_IDLE"):
        return ()
    try:
        name = (_TASKS / str(os.getpid()) / "comm").read_text()
        return tuple(tid for tid in map(int, os.listdir(_TASKS)) if _lower(tid, name, calls))
    except OSError:
        return ()


def _lower(tid: int, name: str, calls: tuple[int, ...]) -> bool:
    """Lower one thread, if it waits for sockets and was not given a name of its own, as gRPC's."""
    try:
        waits_in = (_TASKS / str(tid) / "syscall").read_text().split()[0]
        if (_TASKS / str(tid) / "comm").read_text() != name or waits_in not in map(str, calls):
            return False
        os.sched_setscheduler(tid, os.SCHED_IDLE, os.sched_param(0))
    except (OSError, IndexError):  # it has ended, or may not be looked at
        return False
    return True
